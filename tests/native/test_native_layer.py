"""The forward through its Python face against torch, on every kernel table there is."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kttrio.native import Pool, isa_available
from tests.isas import EVERY_ISA
from tests.native.expert_reference import (
    BF16,
    KINDS,
    MODES,
    TOLERANCE,
    Kind,
    expected,
    make_layer,
    random_experts,
    random_input,
    random_routing,
    relative_error,
    run,
)

# hidden and intermediate size: the smallest, the fixtures', chunks and groups cut short
SIZES = ((32, 32), (64, 32), (256, 128), (288, 160), (160, 416))
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 24, 31, 32, 33, 48, 64, 69)
NUM_EXPERTS = 5
TOP_K = 3

every_isa = pytest.mark.parametrize("isa", EVERY_ISA)
every_mode = pytest.mark.parametrize(("kind", "activation"), MODES, ids=str)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@every_mode
@every_isa
def test_layer_equals_torch_for_every_batch_size(
    isa: str, kind: Kind, activation: str, size: tuple[int, int]
) -> None:
    experts = random_experts(NUM_EXPERTS, *size, kind=kind, seed=1)
    ids, weights = random_routing(70, TOP_K, NUM_EXPERTS, seed=2)
    x = random_input(70, size[0], seed=3, dtype=torch.float32)
    wanted = expected(experts, x, ids, weights)
    with Pool(threads=2, isa=isa) as pool:
        assert pool.isa == isa
        layer = make_layer(pool, experts, activation=activation)
        whole = run(layer, x, ids, weights)
        assert relative_error(whole, wanted) <= TOLERANCE[activation]
        for tokens in TOKENS:
            first = (tokens * 11) % (70 - tokens)
            part = slice(first, first + tokens)
            assert torch.equal(run(layer, x[part], ids[part], weights[part]), whole[part])


@every_mode
@every_isa
def test_all_tokens_on_one_expert(isa: str, kind: Kind, activation: str) -> None:
    """More rows than one call of a kernel takes."""
    experts = random_experts(3, 128, 96, kind=kind, seed=30)
    x = random_input(300, 128, seed=31, dtype=torch.float32)
    ids = torch.full((300, 1), 2, dtype=torch.int32)
    weights = torch.ones(300, 1)
    with Pool(threads=2, isa=isa) as pool:
        layer = make_layer(pool, experts, activation=activation, max_tokens=300)
        out = run(layer, x, ids, weights)
        assert relative_error(out, expected(experts, x, ids, weights)) <= TOLERANCE[activation]
        assert torch.equal(run(layer, x[150:151], ids[:1], weights[:1]), out[150:151])


@pytest.mark.parametrize(("threads", "parts"), [(1, 1), (2, 1), (3, 2), (4, 3), (4, 4)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@every_isa
def test_threads_and_parts(isa: str, kind: Kind, threads: int, parts: int) -> None:
    experts = random_experts(NUM_EXPERTS, 160, 416, kind=kind, seed=4)
    ids, weights = random_routing(33, TOP_K, NUM_EXPERTS, seed=5)
    x = random_input(33, 160, seed=6, dtype=torch.float32)
    activation = "int8" if kind.group_size else "float32"
    with Pool(threads=threads, parts=parts, isa=isa) as pool:
        assert (pool.num_threads, pool.num_parts) == (threads, parts)
        layer = make_layer(pool, experts, activation=activation)
        out = run(layer, x, ids, weights)
        assert relative_error(out, expected(experts, x, ids, weights)) <= TOLERANCE[activation]
        assert torch.equal(run(layer, x[7:8], ids[7:8], weights[7:8]), out[7:8])
    with Pool(threads=parts, parts=parts, isa=isa) as fewest:
        again = run(make_layer(fewest, experts, activation=activation), x, ids, weights)
    assert torch.equal(again, out)


@every_mode
@every_isa
def test_bfloat16_in_and_out(isa: str, kind: Kind, activation: str) -> None:
    experts = random_experts(NUM_EXPERTS, 96, 64, kind=kind, seed=7)
    ids, weights = random_routing(20, TOP_K, NUM_EXPERTS, seed=8)
    x = random_input(20, 96, seed=9, dtype=torch.bfloat16)
    with Pool(threads=2, isa=isa) as pool:
        layer = make_layer(pool, experts, activation=activation)
        out = run(layer, x, ids, weights)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, run(layer, x.float(), ids, weights).bfloat16())
        layer.forward(x, ids, weights, x)  # in place
        assert torch.equal(x, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
@every_isa
def test_accumulate_adds_to_what_is_there(isa: str, parts: int, dtype: torch.dtype) -> None:
    experts = random_experts(2, 64, 96, kind=BF16, seed=10)
    x = random_input(9, 64, seed=11, dtype=dtype)
    ids, weights = random_routing(9, 2, 2, seed=12)
    with Pool(threads=2, parts=parts, isa=isa) as pool:
        layer = make_layer(pool, experts, activation="float32")
        alone = run(layer, x.float(), ids, weights)
        before = random_input(9, 64, seed=13, dtype=dtype)
        out = before.clone()
        layer.forward(x, ids, weights, out, accumulate=True)
    assert torch.equal(out, (before.float() + alone).to(dtype))


@every_isa
def test_the_same_expert_twice_and_skipped_ones(isa: str) -> None:
    experts = random_experts(2, 64, 32, kind=BF16, seed=10)
    x = random_input(3, 64, seed=11, dtype=torch.float32)
    ids = torch.tensor([[1, 1], [-1, 0], [-1, -1]], dtype=torch.int32)
    weights = torch.tensor([[0.25, 0.5], [9.0, 1.0], [9.0, 9.0]])
    with Pool(threads=2, isa=isa) as pool:
        out = run(make_layer(pool, experts, activation="float32"), x, ids, weights)
    assert relative_error(out, expected(experts, x, ids, weights)) <= TOLERANCE["float32"]
    assert torch.equal(out[2], torch.zeros(64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_mode
@every_isa
def test_a_bad_token_spoils_only_itself(isa: str, kind: Kind, activation: str, bad: float) -> None:
    experts = random_experts(2, 64, 32, kind=kind, seed=12)
    x = random_input(40, 64, seed=13, dtype=torch.float32)
    ids, weights = random_routing(40, 2, 2, seed=14)
    ids[5] = torch.tensor([0, 1])
    with Pool(threads=2, isa=isa) as pool:
        layer = make_layer(pool, experts, activation=activation)
        clean = run(layer, x, ids, weights)
        x[5, 3] = bad
        out = run(layer, x, ids, weights)
    assert not out[5].isfinite().any()
    others = torch.arange(40) != 5
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("accumulate", [False, True])
def test_more_tokens_than_max_tokens_run_in_slices(accumulate: bool) -> None:
    experts = random_experts(3, 64, 32, kind=BF16, seed=15)
    x = random_input(30, 64, seed=16, dtype=torch.float32)
    ids, weights = random_routing(30, 2, 3, seed=17)
    with Pool(threads=2) as pool:
        whole, sliced = torch.ones(30, 64), torch.ones(30, 64)
        for out, max_tokens in ((whole, 30), (sliced, 7)):
            layer = make_layer(pool, experts, activation="float32", max_tokens=max_tokens)
            layer.forward(x, ids, weights, out, accumulate=accumulate)
    assert torch.equal(sliced, whole)


def test_no_tokens() -> None:
    experts = random_experts(2, 64, 32, kind=BF16, seed=18)
    with Pool(threads=1) as pool:
        layer = make_layer(pool, experts, activation="float32")
        out = run(
            layer, torch.empty(0, 64), torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2)
        )
    assert out.shape == (0, 64)


def test_layers_of_a_pool_serve_threads_and_outlive_it() -> None:
    experts = random_experts(3, 64, 32, kind=BF16, seed=20)
    x = random_input(16, 64, seed=21, dtype=torch.float32)
    ids, weights = random_routing(16, 2, 3, seed=22)
    with Pool(threads=2) as pool:
        layers = [make_layer(pool, experts, activation=a) for a in ("float32", "bfloat16")]
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


@settings(max_examples=40, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    isa=st.sampled_from(isa_available()),
    hidden=st.integers(1, 18).map(lambda n: 32 * n),
    inter=st.integers(1, 18).map(lambda n: 32 * n),
    tokens=st.integers(1, 90),
    top_k=st.integers(1, 4),
    num_experts=st.integers(1, 9),
    parts=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_layer_equals_torch(
    mode: tuple[Kind, str],
    isa: str,
    hidden: int,
    inter: int,
    tokens: int,
    top_k: int,
    num_experts: int,
    parts: int,
    seed: int,
) -> None:
    kind, activation = mode
    experts = random_experts(num_experts, hidden, inter, kind=kind, seed=seed)
    ids, weights = random_routing(tokens, top_k, num_experts, seed=seed + 1)
    x = random_input(tokens, hidden, seed=seed + 2, dtype=torch.float32)
    with Pool(threads=max(2, parts), parts=parts, isa=isa) as pool:
        layer = make_layer(pool, experts, activation=activation, max_tokens=64)
        out = run(layer, x, ids, weights)
    # A few tokens' error scatters more than that of many.
    assert relative_error(out, expected(experts, x, ids, weights)) <= 1.5 * TOLERANCE[activation]
