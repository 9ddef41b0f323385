"""Layers, routings and references of the expert bench, and the bench as a whole on a tiny shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from kttrio.config import ConfigError
from kttrio.native import NativeError, Pool
from tools.bench import limits as limits_module
from tools.bench.experts import ExpertsConfig, Mode, chosen_modes, measure_experts, run
from tools.bench.layers import SHAPES, Expert, RotatingLayers, Shape, draw_routings

TINY = Shape(num_experts=7, top_k=3, hidden_size=128, intermediate_size=96)
TOLERANCES = {"float32": 1e-5, "bfloat16": 6e-3, "int8": 3e-2}


def layers_of(pool: Pool, experts: list[Expert], activation: str) -> RotatingLayers:
    return RotatingLayers(pool, TINY, experts, activation=activation, max_tokens=5, least_bytes=1)


def test_no_expert_comes_back_before_all_others_had_their_turn() -> None:
    routings = draw_routings(TINY, 1, 20)
    for first, second in zip(routings[::2], routings[1::2], strict=True):
        assert len({*first.ids[0].tolist(), *second.ids[0].tolist()}) == 6
    assert {routing.num_touched for routing in routings} == {TINY.top_k}


def test_each_token_has_different_experts_and_weights_of_sum_one() -> None:
    for routing in draw_routings(TINY, 5, 3):
        assert routing.ids.shape == routing.weights.shape == (5, TINY.top_k)
        assert all(len(set(ids)) == TINY.top_k for ids in routing.ids.tolist())
        assert routing.num_touched == len(set(routing.ids.flatten().tolist()))
        torch.testing.assert_close(routing.weights.sum(1), torch.ones(5))


@pytest.mark.parametrize(
    ("weight_format", "group_size", "activation"),
    [
        ("bf16", 0, "float32"),
        ("bf16", 0, "bfloat16"),
        ("fp8", 128, "bfloat16"),
        ("int8", 64, "int8"),
        ("int4", 32, "int8"),
        ("int4", 32, "float32"),
    ],
)
def test_the_error_is_that_of_rounding(
    weight_format: str, group_size: int, activation: str
) -> None:
    torch.manual_seed(0)
    experts = [Expert(TINY, weight_format, group_size) for _ in range(2)]
    with Pool(threads=1) as pool:
        layers = layers_of(pool, experts, activation)
        x = torch.randn(5, TINY.hidden_size).to(layers.dtype)
        routing = draw_routings(TINY, 5, 1)[0]
        assert layers.error(x, routing) < TOLERANCES[activation]
        experts.reverse()  # other weights than the library has
        assert layers.error(x, routing) > 0.5
        layers.close()


def test_layers_are_added_until_there_is_enough_to_read() -> None:
    with Pool(threads=1) as pool:
        layers = RotatingLayers(
            pool,
            TINY,
            [Expert(TINY, "bf16", 0)],
            activation="bfloat16",
            max_tokens=1,
            least_bytes=2.5 * TINY.num_experts * 3 * 128 * 96 * 2,
        )
        assert len(layers.layers) == 3
        assert layers.expert_bytes == 3 * 128 * 96 * 2
        layers.close()


def test_modes_are_those_that_formats_have() -> None:
    assert [mode.activation for mode in chosen_modes(ExpertsConfig())] == [
        *("bfloat16", "bfloat16", "int8", "int8")
    ]
    config = ExpertsConfig(formats=("fp8", "int4"), activation=("float32", "int8"), group_size=32)
    assert list(chosen_modes(config)) == [
        Mode("fp8", 128, "float32"),
        Mode("int4", 32, "float32"),
        Mode("int4", 32, "int8"),
    ]


def test_activations_that_no_format_takes_are_refused() -> None:
    config = ExpertsConfig(formats=("bf16", "fp8"), activation=("int8",))
    with pytest.raises(ConfigError, match="int8 is nothing for weights of bf16, fp8"):
        measure_experts(config, Console())


def test_an_instruction_set_that_is_not_granted_is_told_before_anything_is_measured() -> None:
    console = Console()
    with console.capture() as capture, pytest.raises(NativeError, match="isa is 'avx9'"):
        measure_experts(ExpertsConfig(isa=("auto", "avx9")), console)
    assert capture.get() == ""


def test_a_record_that_could_not_be_written_is_told_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    for place in (tmp_path, tmp_path / "no" / "such.json"):
        with pytest.raises(ConfigError, match=f"--json {place}: name a file in a directory"):
            run(["--json", str(place)])


def test_operations_are_multiplications_and_additions_of_three_matrices() -> None:
    assert TINY.num_operations(5) == 2 * 3 * 128 * 96 * TINY.top_k * 5


def test_every_cell_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(limits_module, "MIB_TO_READ", 16)
    config = ExpertsConfig(
        shapes=("tiny",), formats=("bf16", "int8"), tokens=(1, 5), threads=1, gib=0, seconds=0.02
    )
    console = Console(width=80)
    with console.capture() as capture:
        found = measure_experts(config, console)
    cells = found["cells"]
    assert [(cell["weight_format"], cell["tokens"]) for cell in cells] == [
        *(("bf16", 1), ("bf16", 5), ("int8", 1), ("int8", 5))
    ]
    for cell in cells:
        assert cell["error"] < TOLERANCES["int8"]
        assert cell["best_milliseconds"] <= cell["milliseconds"]
        assert cell["num_forwards"] >= 3
        assert cell["read_limit"] > 1e8
        seconds = cell["milliseconds"] / 1e3
        assert cell["operations"] * seconds == pytest.approx(TINY.num_operations(cell["tokens"]))
    assert "read_2m" in capture.get()
    assert "int8/128" in capture.get()
