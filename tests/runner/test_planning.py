from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kttrio.config import (
    ConfigError,
    DeviceConfig,
    EngineConfig,
    ExpertConfig,
    ModelConfig,
    PlacementConfig,
    RunnerConfig,
)
from kttrio.layers.triton.scratch import scratch_bytes
from kttrio.runner.planning import plan_start
from kttrio.weights.checkpoint import CheckpointError
from tests.machines import GIB, machine

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINTS = sorted(file.parent.name for file in FIXTURES.glob("*/config.json"))
ENGINE = EngineConfig(max_running_requests=2, chunked_prefill_size=64)


def look(path, on=None, *, experts=None, engine=ENGINE, placement=None, device=None):
    config = RunnerConfig(
        ModelConfig(model=path, dtype="float32"),
        experts or ExpertConfig(),
        engine,
        device or DeviceConfig(),
        placement=placement or PlacementConfig(),
    )
    return plan_start(config, on or machine(host=GIB))


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("method", ["auto", "int4"])
def test_the_config_alone_says_what_the_headers_say(tmp_path, name, method):
    experts = ExpertConfig(kt_method=method)
    known = look(FIXTURES / name, experts=experts)
    (tmp_path / "config.json").symlink_to(FIXTURES / name / "config.json")
    for path in (tmp_path, tmp_path / "config.json"):
        found = look(path, experts=experts)
        assert (found.needs, found.plan) == (known.needs, known.plan)


def test_what_does_not_fit_is_shown_as_it_was_asked_for():
    found = look(FIXTURES / "qwen3_next", machine(host=2**20))
    assert found.refusal.startswith("the model does not fit")
    assert (found.plan.num_slots, found.plan.max_step_tokens) == (2, 64)
    assert found.plan.short == ("cpu",)


def test_what_is_reduced_is_said(caplog):
    look(FIXTURES / "qwen3_next", engine=replace(ENGINE, max_total_tokens=10**6))
    assert "--max-total-tokens 1000000 is reduced to 8192" in caplog.text


def test_a_number_of_drafts_without_drafts_is_said(caplog):
    look(FIXTURES / "qwen3_next", engine=replace(ENGINE, speculative_num_draft_tokens=3))
    assert "--speculative-num-draft-tokens 3 has no effect without --spec" in caplog.text


def test_errors_name_the_file(tmp_path):
    config = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=str(config)):
        look(tmp_path)
    with pytest.raises(ConfigError, match=f"--model: there is no {config}"):
        look(config)
    config.write_text('{"model_type": "mystery"}')
    with pytest.raises(CheckpointError, match="'mystery' is not supported"):
        look(config)
    config.write_bytes((FIXTURES / "qwen3_next_fp8" / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=f"the experts in {config} are fp8"):
        look(config, experts=ExpertConfig(kt_method="bf16"))
    with pytest.raises(ConfigError, match=f"--kt-weight-path /x: there is only {config}"):
        look(config, experts=ExpertConfig(kt_weight_path=Path("/x")))
    with pytest.raises(ConfigError, match="--model names no"):
        look(None)


def test_kernels_of_experts_have_their_memory_on_a_gpu():
    """For a step, or a long prompt where that is more; torch on the CPU works without."""
    engine = replace(ENGINE, chunked_prefill_size=512)
    placement = PlacementConfig(kt_num_gpu_experts=2)
    found = look(
        FIXTURES / "qwen3_next", machine(host=GIB, gpu=GIB), engine=engine, placement=placement
    )
    shape = found.needs.estimate.shape
    tokens = max(found.plan.max_step_tokens, found.plan.max_long_tokens)
    sizes = (shape.hidden_size, found.needs.estimate.intermediate_size)
    expected = scratch_bytes(tokens, shape.top_k, sizes, 4)
    assert found.plan.size("device expert scratch") == expected > 0
    alone = look(FIXTURES / "qwen3_next", engine=engine)
    assert alone.plan.size("device expert scratch") == 0


def test_decode_steps_are_captured_on_a_gpu_and_have_their_memory():
    engine, gpu = EngineConfig(max_running_requests=20), machine(host=GIB, gpu=GIB)
    plan = look(FIXTURES / "qwen3_next", gpu, engine=engine).plan
    assert plan.graph_sizes == (1, 2, 4, 8, 16, 20)
    wished = DeviceConfig(cuda_graph_max_bs=6, cuda_graph_bs=(3, 6, 9))
    fewer = look(FIXTURES / "qwen3_next", gpu, engine=engine, device=wished).plan
    assert fewer.graph_sizes == (3, 6)
    assert plan.size("decode graphs") > fewer.size("decode graphs") > 0


NO_GRAPHS = {
    "a CPU": (machine(host=GIB), ENGINE, DeviceConfig()),
    "a flag": (machine(host=GIB, gpu=GIB), ENGINE, DeviceConfig(disable_cuda_graph=True)),
    "torch": (machine(host=GIB, gpu=GIB), ENGINE, DeviceConfig(attention_backend="torch")),
    "drafts": (
        machine(host=GIB, gpu=GIB),
        replace(ENGINE, speculative_algorithm="MTP"),
        DeviceConfig(),
    ),
}


@pytest.mark.parametrize(("on", "engine", "device"), NO_GRAPHS.values(), ids=NO_GRAPHS)
def test_elsewhere_no_step_is_captured(on, engine, device):
    plan = look(FIXTURES / "qwen3_next", on, engine=engine, device=device).plan
    assert plan.graph_sizes == ()
    assert plan.size("decode graphs") == 0
