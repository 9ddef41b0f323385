"""What the Python face refuses, by name."""

from __future__ import annotations

import pytest
import torch

from kttrio.native import ExpertLayer, NativeError, Pool, isa_available
from tests.isas import TABLES
from tests.native.expert_reference import BF16, FP8, Kind, make_layer, random_experts


def test_auto_takes_the_best_isa() -> None:
    with Pool(threads=1) as pool:
        assert pool.isa == isa_available()[0]


@pytest.mark.parametrize("family", ["avx512", "avx2"])
def test_a_family_stands_for_its_best_table(family: str) -> None:
    tables = [name for name in isa_available() if name.startswith(family)]
    if not tables:
        pytest.skip(f"this machine grants no {family}")
    with Pool(threads=1, isa=family) as pool:
        assert pool.isa == tables[0]


def test_a_missing_isa_is_named_with_those_there_are() -> None:
    missing = [name for name in TABLES if name not in isa_available()]
    if not missing:
        pytest.skip("this machine grants every instruction set")
    there = ", ".join(isa_available())
    with pytest.raises(NativeError, match=f"set {missing[0]} .*; it grants {there}"):
        Pool(isa=missing[0])


def test_wrong_settings_are_named() -> None:
    with pytest.raises(NativeError, match="isa is 'sse', but must be one of auto, amx"):
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


def test_numbers_that_would_wrap_are_refused() -> None:
    wrapped = 2**32 + 1  # 1, where 32 bits are left
    with pytest.raises(NativeError, match=f"threads is {wrapped}, which is too large"):
        Pool(threads=wrapped)
    with pytest.raises(NativeError, match="a node is"):
        Pool(nodes=[2**32])
    with Pool(threads=1) as pool:
        for name in ("num_experts", "max_tokens", "max_top_k"):
            with pytest.raises(NativeError, match=f"{name} is {wrapped}, which is too large"):
                ExpertLayer(pool, **layer_arguments(**{name: wrapped}))


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
        ({"weight_format": "q4_0"}, "weight_format is 'q4_0', but must be one of bf16, fp8, int8"),
        ({"group_size": 64}, "group_size is 64, but must be 0 for weights without scales"),
        ({"weight_format": "fp8", "group_size": 64}, "group_size is 64, but must be 128 for fp8"),
        ({"weight_format": "int4"}, "group_size is 0, but must be 32, 64 or 128"),
        ({"activation": "float16"}, "activation is 'float16'"),
        ({"activation": "int8"}, "int8 activations are for int8 and int4 weights"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_top_k": -1}, "max_top_k is -1"),
    ],
)
def test_wrong_shapes_of_layers_are_named(changed: dict[str, object], message: str) -> None:
    with Pool(threads=1) as pool, pytest.raises(NativeError, match=message):
        ExpertLayer(pool, **layer_arguments(**changed))


@pytest.fixture
def small() -> ExpertLayer:
    with Pool(threads=1) as pool:
        experts = random_experts(2, 64, 32, kind=BF16, seed=23)
        return make_layer(pool, experts, activation="float32", max_top_k=2)


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
    with pytest.raises(NativeError, match="does not go with accumulate"):
        small.forward(x, ids, weights, x, accumulate=True)


@pytest.mark.parametrize("action", ["set_expert", "get_expert"])
def test_wrong_weights_are_named(small: ExpertLayer, action: str) -> None:
    gate, down = torch.zeros(32, 64).bfloat16(), torch.zeros(64, 32).bfloat16()
    good = {"gate": gate, "up": gate, "down": down}
    for index, changed, message in (
        (2, {}, "expert is 2, but must be from 0 to 1"),
        (2**32, {}, "expert is 4294967296, which is too large"),
        (0, {"gate": gate.float()}, "gate is float32, but must be bfloat16"),
        (0, {"down": gate}, r"down has shape \(32, 64\), but must have \(64, 32\)"),
        (0, {"up": down.T}, "up is not contiguous"),
        (0, {"up_scale": torch.ones(1, 1)}, "bf16 weights have no scales, leave up_scale out"),
    ):
        with pytest.raises(NativeError, match=message):
            getattr(small, action)(index, **{**good, **changed})


@pytest.mark.parametrize("kind", [FP8, Kind("int4", 32)], ids=str)
def test_wrong_scales_are_named(kind: Kind) -> None:
    (expert,) = random_experts(1, 64, 96, kind=kind, seed=24)
    tensors = expert.tensors()
    scale = tensors["down_scale"]
    assert scale is not None
    with Pool(threads=1) as pool:
        layer = make_layer(pool, [expert], activation="float32")
    for changed, message in (
        ({"down_scale": None}, f"down_scale is missing: {kind.weight_format} weights have scales"),
        ({"down_scale": scale[:, :0]}, r"down_scale has shape \(\d+, 0\), but must have"),
        ({"gate_scale": scale.half()}, "gate_scale is float16, but must be"),
    ):
        with pytest.raises(NativeError, match=message):
            layer.set_expert(0, **{**tensors, **changed})


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
