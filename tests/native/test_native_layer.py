"""The expert library through its Python face against torch, on every instruction set there is."""

from __future__ import annotations

import threading

import pytest
import torch

from kttrio.native import ExpertLayer, NativeError, Pool, isa_available
from tests.native.expert_reference import (
    expected,
    make_layer,
    random_experts,
    random_input,
    random_routing,
    relative_error,
    run,
    set_expert,
)

FORMATS = ("bf16", "fp8")
ACTIVATIONS = ("float32", "bfloat16")
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}
# hidden and intermediate size: the smallest, the fixtures', scale blocks cut short on either side
SIZES = ((32, 32), (64, 32), (256, 128), (288, 160), (160, 416))
NUM_EXPERTS = 5
TOP_K = 3


@pytest.fixture(
    params=[
        pytest.param("amx", marks=pytest.mark.amx),
        "avx512",
        "avx2",
    ]
)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in isa_available():
        pytest.skip(f"this machine does not grant {request.param}")
    return request.param


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_layer_equals_torch_for_every_batch_size(
    isa: str, weight_format: str, activation: str, size: tuple[int, int]
) -> None:
    hidden, inter = size
    experts = random_experts(NUM_EXPERTS, hidden, inter, weight_format=weight_format, seed=1)
    ids, weights = random_routing(70, TOP_K, NUM_EXPERTS, seed=2)
    x = random_input(70, hidden, seed=3, dtype=torch.float32)
    wanted = expected(experts, x, ids, weights)
    with Pool(threads=2, isa=isa) as pool:
        assert pool.isa == isa
        layer = make_layer(pool, experts, activation=activation)
        whole = run(layer, x, ids, weights)
        assert relative_error(whole, wanted) <= TOLERANCE[activation]
        for tokens in range(1, 70):
            first = (tokens * 11) % (70 - tokens)
            part = slice(first, first + tokens)
            assert torch.equal(run(layer, x[part], ids[part], weights[part]), whole[part])


@pytest.mark.parametrize(("threads", "parts"), [(1, 1), (2, 1), (3, 2), (4, 3), (4, 4)])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_threads_and_parts(isa: str, weight_format: str, threads: int, parts: int) -> None:
    experts = random_experts(NUM_EXPERTS, 160, 416, weight_format=weight_format, seed=4)
    ids, weights = random_routing(33, TOP_K, NUM_EXPERTS, seed=5)
    x = random_input(33, 160, seed=6, dtype=torch.float32)
    with Pool(threads=threads, parts=parts, isa=isa) as pool:
        assert (pool.num_threads, pool.num_parts) == (threads, parts)
        layer = make_layer(pool, experts, activation="float32")
        out = run(layer, x, ids, weights)
        assert relative_error(out, expected(experts, x, ids, weights)) <= 1e-5
        assert torch.equal(run(layer, x[7:8], ids[7:8], weights[7:8]), out[7:8])
    with Pool(threads=parts, parts=parts, isa=isa) as fewest:
        again = run(make_layer(fewest, experts, activation="float32"), x, ids, weights)
    assert torch.equal(again, out)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_bfloat16_in_and_out(isa: str, weight_format: str, activation: str) -> None:
    experts = random_experts(NUM_EXPERTS, 96, 64, weight_format=weight_format, seed=7)
    ids, weights = random_routing(20, TOP_K, NUM_EXPERTS, seed=8)
    x = random_input(20, 96, seed=9, dtype=torch.bfloat16)
    with Pool(threads=2, isa=isa) as pool:
        layer = make_layer(pool, experts, activation=activation)
        out = run(layer, x, ids, weights)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, run(layer, x.float(), ids, weights).bfloat16())
        layer.forward(x, ids, weights, x)  # in place
        assert torch.equal(x, out)


def test_the_same_expert_twice_and_skipped_ones(isa: str) -> None:
    experts = random_experts(2, 64, 32, weight_format="bf16", seed=10)
    x = random_input(3, 64, seed=11, dtype=torch.float32)
    ids = torch.tensor([[1, 1], [-1, 0], [-1, -1]], dtype=torch.int32)
    weights = torch.tensor([[0.25, 0.5], [9.0, 1.0], [9.0, 9.0]])
    with Pool(threads=2, isa=isa) as pool:
        out = run(make_layer(pool, experts, activation="float32"), x, ids, weights)
    assert relative_error(out, expected(experts, x, ids, weights)) <= 1e-5
    assert torch.equal(out[2], torch.zeros(64))


def test_a_bad_token_spoils_only_itself(isa: str) -> None:
    experts = random_experts(2, 64, 32, weight_format="bf16", seed=12)
    x = random_input(40, 64, seed=13, dtype=torch.float32)
    ids, weights = random_routing(40, 2, 2, seed=14)
    ids[5] = torch.tensor([0, 1])
    for activation in ACTIVATIONS:
        with Pool(threads=2, isa=isa) as pool:
            layer = make_layer(pool, experts, activation=activation)
            clean = run(layer, x, ids, weights)
            spoiled = x.clone()
            spoiled[5] = float("nan")
            out = run(layer, spoiled, ids, weights)
        assert out[5].isnan().all()
        others = torch.arange(40) != 5
        assert torch.equal(out[others], clean[others])


def test_more_tokens_than_max_tokens_run_in_slices() -> None:
    experts = random_experts(3, 64, 32, weight_format="bf16", seed=15)
    x = random_input(30, 64, seed=16, dtype=torch.float32)
    ids, weights = random_routing(30, 2, 3, seed=17)
    with Pool(threads=2) as pool:
        whole = run(make_layer(pool, experts, activation="float32"), x, ids, weights)
        layer = make_layer(pool, experts, activation="float32", max_tokens=7)
        assert torch.equal(run(layer, x, ids, weights), whole)


def test_no_tokens() -> None:
    experts = random_experts(2, 64, 32, weight_format="bf16", seed=18)
    with Pool(threads=1) as pool:
        layer = make_layer(pool, experts, activation="float32")
        out = run(
            layer, torch.empty(0, 64), torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2)
        )
    assert out.shape == (0, 64)


def test_nbytes_counts_what_is_set() -> None:
    experts = random_experts(4, 256, 128, weight_format="fp8", seed=19)
    with Pool(threads=1) as pool:
        layer = ExpertLayer(
            pool,
            num_experts=4,
            hidden_size=256,
            intermediate_size=128,
            weight_format="fp8",
            activation="bfloat16",
            max_tokens=1,
            max_top_k=1,
        )
        assert layer.nbytes == 0
        set_expert(layer, 3, experts[3])
        once = layer.nbytes
        assert 3 * 256 * 128 <= once <= 3 * 256 * 128 * 1.02
        set_expert(layer, 3, experts[0])
        assert layer.nbytes == once
        set_expert(layer, 0, experts[0])
        assert layer.nbytes == 2 * once


def test_layers_of_a_pool_serve_threads_and_outlive_it() -> None:
    experts = random_experts(3, 64, 32, weight_format="bf16", seed=20)
    x = random_input(16, 64, seed=21, dtype=torch.float32)
    ids, weights = random_routing(16, 2, 3, seed=22)
    with Pool(threads=2) as pool:
        layers = [make_layer(pool, experts, activation=a) for a in ACTIVATIONS]
    wanted = [run(layer, x, ids, weights) for layer in layers]
    results: list[list[torch.Tensor]] = [[], []]

    def work(index: int) -> None:
        results[index].extend(run(layers[index], x, ids, weights) for _ in range(20))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, outs in enumerate(results):
        assert len(outs) == 20
        assert all(torch.equal(out, wanted[index]) for out in outs)


def test_auto_takes_the_best_isa() -> None:
    with Pool(threads=1) as pool:
        assert pool.isa == isa_available()[0]


def test_a_missing_isa_is_named() -> None:
    missing = [name for name in ("amx", "avx512") if name not in isa_available()]
    if not missing:
        pytest.skip("this machine grants every instruction set")
    with pytest.raises(NativeError, match=f"does not grant the instruction set {missing[0]}"):
        Pool(isa=missing[0])


def test_wrong_settings_are_named() -> None:
    with pytest.raises(NativeError, match="isa is 'sse', but must be one of auto, avx2"):
        Pool(isa="sse")
    with pytest.raises(NativeError, match="threads is 0"):
        Pool(threads=0)
    with pytest.raises(NativeError, match="parts is 0"):
        Pool(parts=0)
    with pytest.raises(NativeError, match="parts is 2, but 1 nodes"):
        Pool(parts=2, nodes=[0])
    with pytest.raises(NativeError, match="NUMA node 77 has no processor"):
        Pool(nodes=[77])
    with pytest.raises(NativeError, match="3 parts needs at least as many threads, not 2"):
        Pool(threads=2, parts=3)


@pytest.fixture
def small() -> ExpertLayer:
    with Pool(threads=1) as pool:
        return make_layer(
            pool,
            random_experts(2, 64, 32, weight_format="bf16", seed=23),
            activation="float32",
            max_top_k=2,
        )


def layer_arguments(**changed: object) -> dict[str, object]:
    return {
        "num_experts": 1,
        "hidden_size": 64,
        "intermediate_size": 32,
        "weight_format": "bf16",
        "activation": "float32",
        "max_tokens": 1,
        "max_top_k": 1,
        **changed,
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 50}, "hidden_size is 50, but must be a multiple of 32"),
        ({"intermediate_size": 0}, "intermediate_size is 0, but must be from 1"),
        ({"weight_format": "int4"}, "weight_format is 'int4', but must be one of bf16, fp8"),
        ({"activation": "float16"}, "activation is 'float16'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_top_k": -1}, "max_top_k is -1"),
    ],
)
def test_wrong_shapes_of_layers_are_named(changed: dict[str, object], message: str) -> None:
    with Pool(threads=1) as pool, pytest.raises(NativeError, match=message):
        ExpertLayer(pool, **layer_arguments(**changed))


def test_wrong_tensors_are_named(small: ExpertLayer) -> None:
    x, out = torch.zeros(3, 64), torch.zeros(3, 64)
    ids, weights = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2)
    for arguments, message in (
        ((x[:, :32], ids, weights, out), r"x has shape \(3, 32\), but must have \(3, 64\)"),
        ((x.half(), ids, weights, out), "dtype of x is 'float16'"),
        ((x.bfloat16(), ids, weights, out), "out is float32, but must be bfloat16"),
        ((x, ids.long(), weights, out), "ids is int64, but must be int32"),
        ((x, ids[0], weights, out), r"ids has shape \(2,\)"),
        ((x, ids, weights[:2], out), r"weights has shape \(2, 2\)"),
        ((x, ids, weights, torch.zeros(64, 3).T), "out is not contiguous"),
        ((x.to("meta"), ids, weights, out), "x is on meta"),
        ((x, ids + 2, weights, out), r"ids\[0\]\[0\] = 2, but experts go from 0 to 1"),
        ((x, ids.repeat(1, 2), weights.repeat(1, 2), out), "top_k is 4, but must be from 1 to 2"),
    ):
        with pytest.raises(NativeError, match=message):
            small.forward(*arguments)


def test_wrong_weights_are_named(small: ExpertLayer) -> None:
    gate, down = torch.zeros(32, 64).bfloat16(), torch.zeros(64, 32).bfloat16()
    good = {"gate": gate, "up": gate, "down": down}
    scale = torch.ones(1, 1)
    for index, changed, message in (
        (2, {}, "expert is 2, but must be from 0 to 1"),
        (0, {"gate": gate.float()}, "gate is float32, but must be bfloat16"),
        (0, {"down": gate}, r"down has shape \(32, 64\), but must have \(64, 32\)"),
        (0, {"up": down.T}, "up is not contiguous"),
        (0, {"up_scale": scale}, "has no scales"),
        (0, {"down_scale": scale[0]}, r"down_scale has shape \(1,\)"),
    ):
        with pytest.raises(NativeError, match=message):
            small.set_expert(index, **{**good, **changed})


def test_fp8_scales_are_needed_and_nan_is_refused() -> None:
    expert = random_experts(1, 64, 32, weight_format="fp8", seed=24)[0]
    with Pool(threads=1) as pool:
        layer = make_layer(pool, [expert], activation="float32")
    matrices = {"gate": expert.gate.stored, "up": expert.up.stored, "down": expert.down.stored}
    with pytest.raises(NativeError, match="gate_scale is a null pointer"):
        layer.set_expert(0, **matrices)
    expert.down.stored.view(torch.uint8)[2, 3] = 0x7F
    with pytest.raises(NativeError, match="expert 0: down holds NaN at row 2, column 3"):
        set_expert(layer, 0, expert)


def test_closed_things_say_so(small: ExpertLayer) -> None:
    pool = Pool(threads=1)
    pool.close()
    pool.close()
    with pytest.raises(NativeError, match="the pool is closed"):
        ExpertLayer(pool, **layer_arguments())
    small.close()
    small.close()
    with pytest.raises(NativeError, match="the layer is closed"):
        _ = small.nbytes
