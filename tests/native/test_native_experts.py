"""Experts that come and go: set, read back, replaced, taken out."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from kttrio.native import ExpertLayer, NativeError, Pool
from tests.native.expert_reference import (
    BF16,
    FP8,
    GROUPED,
    KINDS,
    Kind,
    empty_layer,
    get_expert,
    holds,
    make_layer,
    random_experts,
    random_input,
    random_routing,
    run,
    set_expert,
)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_experts_come_out_as_they_went_in(kind: Kind, parts: int) -> None:
    experts = random_experts(3, 160, 288, kind=kind, seed=1)
    with Pool(threads=3, parts=parts) as pool:
        layer = make_layer(pool, experts, activation="bfloat16")
        assert all(holds(layer, index, expert) for index, expert in enumerate(experts))


@pytest.mark.parametrize("kind", [BF16, FP8, GROUPED[0]], ids=str)
def test_an_expert_is_replaced_and_taken_out(kind: Kind) -> None:
    first, second, third, other = random_experts(4, 64, 96, kind=kind, seed=2)
    x = random_input(1, 64, seed=3, dtype=torch.float32)
    ids, weights = torch.tensor([[1]], dtype=torch.int32), torch.ones(1, 1)
    with Pool(threads=2) as pool:
        layer = make_layer(pool, [first, second, third], activation="float32")
        fresh = make_layer(pool, [first, other, third], activation="float32")
        layer.clear_expert(1)
        layer.clear_expert(1)
        with pytest.raises(NativeError, match=r"ids\[0\]\[0\] = 1, but that expert has no weights"):
            run(layer, x, ids, weights)
        with pytest.raises(NativeError, match="expert 1 has no weights"):
            get_expert(layer, 1, second)
        set_expert(layer, 1, second)
        set_expert(layer, 1, other)
        assert torch.equal(run(layer, x, ids, weights), run(fresh, x, ids, weights))
        assert holds(layer, 0, first)
        assert holds(layer, 1, other)
        assert holds(layer, 2, third)


def test_nbytes_counts_what_is_set() -> None:
    experts = random_experts(4, 256, 128, kind=FP8, seed=19)
    with Pool(threads=1) as pool:
        layer = empty_layer(pool, experts[0], num_experts=4, activation="bfloat16")
        assert layer.nbytes == 0
        set_expert(layer, 3, experts[3])
        once = layer.nbytes
        assert 3 * 256 * 128 <= once <= 3 * 256 * 128 * 1.02
        set_expert(layer, 3, experts[0])
        assert layer.nbytes == once
        set_expert(layer, 0, experts[0])
        assert layer.nbytes == 2 * once
        layer.clear_expert(3)
        assert layer.nbytes == once


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_only_experts_that_are_set_take_memory() -> None:
    """Every second one of 24 experts of 3 MiB, as when the others live on a device."""
    (expert,) = random_experts(1, 1024, 512, kind=BF16, seed=4)
    with Pool(threads=2) as pool:
        layer = empty_layer(pool, expert, num_experts=24, activation="bfloat16")
        before = resident_bytes()
        for index in range(1, 24, 2):
            set_expert(layer, index, expert)
        taken = resident_bytes() - before
        assert layer.nbytes <= taken + (1 << 20)
        assert taken < layer.nbytes + (8 << 20)
        for index in range(1, 24, 2):
            layer.clear_expert(index)
        assert resident_bytes() - before < 8 << 20


def test_a_refused_expert_is_not_set() -> None:
    good, bad = random_experts(2, 64, 32, kind=FP8, seed=24)
    bad.down.stored.view(torch.uint8)[2, 3] = 0x7F
    with Pool(threads=2) as pool:
        layer = make_layer(pool, [good], activation="float32")
        with pytest.raises(NativeError, match=r"expert 0: down weight \[2, 3\] is not a finite"):
            set_expert(layer, 0, bad)
        assert layer.nbytes == 0
        set_expert(layer, 0, good)
        assert holds(layer, 0, good)


@pytest.mark.parametrize("kind", GROUPED, ids=str)
def test_infinite_scales_are_refused(kind: Kind) -> None:
    (expert,) = random_experts(1, 64, 32, kind=kind, seed=25)
    assert expert.up.scale is not None
    expert.up.scale[7, 0] = float("inf")
    with Pool(threads=1) as pool, pytest.raises(NativeError, match=r"0: up scale \[7, 0\]"):
        make_layer(pool, [expert], activation="float32")


def test_experts_are_swapped_while_others_run() -> None:
    experts = random_experts(4, 96, 64, kind=Kind("int4", 32), seed=5)
    x = random_input(8, 96, seed=6, dtype=torch.float32)
    ids, weights = random_routing(8, 2, 3, seed=7)
    stop = threading.Event()

    def swap(layer: ExpertLayer) -> None:
        while not stop.is_set():
            layer.clear_expert(3)
            set_expert(layer, 3, experts[3])
            assert holds(layer, 3, experts[3])

    with Pool(threads=2) as pool:
        layer = make_layer(pool, experts, activation="int8")
        wanted = run(layer, x, ids, weights)
        swapper = threading.Thread(target=swap, args=(layer,))
        swapper.start()
        try:
            same = [torch.equal(run(layer, x, ids, weights), wanted) for _ in range(50)]
        finally:
            stop.set()
            swapper.join()
        assert all(same)
        assert holds(layer, 3, experts[3])
