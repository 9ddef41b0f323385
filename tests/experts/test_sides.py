"""Experts as they are loaded into a bank: each of them on one side only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kttrio.experts.hybrid import HybridExperts
from kttrio.experts.source import Matrices
from kttrio.native import NativeError
from tests.divided import divide, load_divided
from tests.golden import FIXTURES, load_golden, read_tensors, run_alone, write_checkpoint

ROOT = Path(__file__).parents[2]
PLAIN, FP8 = FIXTURES / "qwen3_next", FIXTURES / "qwen3_next_fp8"
METHODS = [(PLAIN, "auto"), (FP8, "auto"), (PLAIN, "int4"), (FP8, "int8"), (PLAIN, "fp8")]


@pytest.mark.parametrize(("source", "method"), METHODS, ids=["bf16", "fp8", "int4", "int8", "made"])
def test_experts_on_the_device_are_those_of_the_host_bit_for_bit(tmp_path, source, method):
    flags = {"kt_method": method, "kt_cache_dir": tmp_path}
    whole = load_divided(source, None, **flags)
    model = load_divided(source, divide(source, 0.4, "random"), **flags)
    bank, slots = model.bank, model.bank.sides.slots
    for layer, residency in enumerate(bank.sides.residencies):
        for expert, slot in enumerate(residency.host_slot_of.tolist()):
            stored = unpacked(slots.shape, whole.bank.host_layers[layer], expert)
            if slot >= 0:
                assert same(slots.slot(slot), stored)
                with pytest.raises(NativeError, match="no weights"):
                    unpacked(slots.shape, bank.host_layers[layer], expert)
            else:
                assert same(unpacked(slots.shape, bank.host_layers[layer], expert), stored)
    model.close()
    whole.close()


def unpacked(shape, layer, expert):
    room = shape.outline().map(lambda t: torch.zeros(t.shape, dtype=t.dtype))
    room.unpack_from(layer, expert)
    return room


def same(one: Matrices, other: Matrices):
    pairs = zip(one, other, strict=True)
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for pair in pairs
        for a, b in zip(*pair, strict=True)
        if a is not None
    )


@pytest.mark.parametrize("ratio", [0, 0.5, 1])
def test_no_expert_is_held_twice(ratio):
    whole = load_divided(FP8, None)
    model = load_divided(FP8, divide(FP8, ratio))
    assert model.bank.host_bytes == pytest.approx((1 - ratio) * whole.bank.host_bytes)
    assert model.bank.nbytes == model.bank.host_bytes + model.bank.device_bytes
    # the host's kernels pad experts this small
    assert model.bank.device_bytes == pytest.approx(ratio * whole.bank.nbytes, rel=0.2)
    model.close()
    whole.close()


@torch.inference_mode()
def test_layers_that_are_all_on_the_device_ask_nobody():
    model = load_divided(PLAIN, divide(PLAIN, 1))
    for layer in model.bank.host_layers:
        layer.close()
    golden = load_golden(PLAIN)
    logits = run_alone(model, golden["input_ids"].tolist(), (20, 21))
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-3, atol=1e-3)
    model.close()


def test_a_layer_for_drafts_stays_on_the_host():
    model = load_divided(PLAIN, divide(PLAIN, 1), num_drafts=1)
    assert [residency.num_resident for residency in model.bank.sides.residencies][-1] == 0
    assert len(model.bank.layers) == len(model.bank.sides.residencies)
    model.close()


def test_free_slots_are_taken_with_the_others():
    division = divide(PLAIN, 0.5, num_ring_slots=4, num_spare_slots=2)
    model = load_divided(PLAIN, division)
    assert model.bank.sides.slots.num_slots == division.num_resident + 6
    assert model.bank.sides.ring is not None
    model.close()


def test_what_experts_cost_is_measured_where_some_may_pass_and_told():
    for share, num_ring_slots in ((0.5, 4), (0.5, 0), (1, 4)):
        model = load_divided(PLAIN, divide(PLAIN, share, num_ring_slots=num_ring_slots))
        ring, facts = model.bank.sides.ring, model.bank.facts
        if share < 1 and num_ring_slots:
            assert ring.rates.send_expert > 0
            assert facts["rates"].startswith("an expert of 12.3 kB takes ")
        else:
            assert facts == {}
        model.close()


def test_without_a_division_nothing_is_divided():
    model = load_divided(PLAIN, None)
    assert model.bank.sides is None
    assert model.bank.facts == {}
    assert not any(isinstance(layer, HybridExperts) for layer in model.bank.layers)
    model.close()


@pytest.mark.parametrize("resident", [0, 1])
def test_a_damaged_expert_is_refused_on_either_side(tmp_path, resident):
    name = "model.layers.1.mlp.experts.1.up_proj.weight_scale_inv"
    tensors = read_tensors(FP8)
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    raw = json.loads((FP8 / "config.json").read_text())
    directory = write_checkpoint(tmp_path / "damaged", raw, tensors)
    message = r"the expert of 'model\.layers\.1\.mlp\.experts\.1\.gate_proj.*: .* finite number"
    with pytest.raises(NativeError, match=message):
        load_divided(directory, divide(FP8, resident))


RESIDENT_SET = """
import sys
import torch
from kttrio.config import ExpertConfig
from kttrio.device.host import HostDevice
from kttrio.experts.bank import ExpertBank, ExpertLimits
from kttrio.experts.division import Division
from kttrio.experts.formats import ExpertPlan
from kttrio.experts.slots import SlotShape
from kttrio.weights.loader import Countdown, ExpertWeights
from kttrio.weights.quantize import Target

NUM_LAYERS, NUM_EXPERTS = 2, 32
MAPS = [ExpertWeights("{}g", "{}u", "{}d", NUM_EXPERTS, 512, 512)] * NUM_LAYERS
HELD = (Target("bf16", 0),) * NUM_LAYERS

class Source:
    def experts(self, layer, countdown):
        for expert in range(NUM_EXPERTS):
            yield SlotShape.of(MAPS[0], HELD[0]).outline().map(ones)

def ones(tensor):
    return torch.ones_like(tensor, device="cpu")

def load(ratio):
    mask = torch.zeros(NUM_LAYERS, NUM_EXPERTS, dtype=torch.bool)
    mask[:, : int(ratio * NUM_EXPERTS)] = True
    limits = ExpertLimits(4, 2)
    bank = ExpertBank(
        ExpertConfig(kt_cpuinfer=1),
        dtype=torch.float32,
        limits=limits,
        division=Division(HostDevice(), mask),
    )
    bank.load(ExpertPlan(HELD, HELD, ("float32",) * NUM_LAYERS), MAPS, Source(), Countdown(0, None))
    return bank

def anonymous():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

load(0.5).close()  # what is made once for the process is made
for ratio in (0, 0.5, 1):
    before = anonymous()
    bank = load(ratio)
    print(anonymous() - before, bank.nbytes)
    bank.close()
    del bank
"""


def test_memory_is_taken_once_for_each_expert():
    """As the operating system sees it, with none, half and all of them on the device."""
    freed_at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT_SET],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | freed_at_once,
    )
    for line in done.stdout.splitlines():
        resident, counted = map(int, line.split())
        assert counted == 2 * 32 * 3 * 512 * 512 * 2
        assert resident == pytest.approx(counted, rel=0.1)
