"""Experts on both sides against all of them in torch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from kttrio import native
from kttrio.device.host import HostDevice
from kttrio.experts.carry import Carry
from kttrio.experts.handoff import MOST_KEPT, Handoff, HandoffShape, HostSide
from kttrio.experts.hybrid import DeviceSide, HybridExperts
from kttrio.experts.routing import SoftmaxRouter
from kttrio.experts.slots import ExpertSlots, Residency, SlotShape
from kttrio.experts.source import Matrices
from kttrio.weights.formats import base as formats
from kttrio.weights.formats.base import Packed
from kttrio.weights.quantize import Target
from tests.device.shuffled import ShuffledDevice
from tests.reference import TorchExperts

EXPERTS, HIDDEN, INNER, TOP_K, MOST_TOKENS = 8, 64, 96, 4, 160
ROUTER = SoftmaxRouter(EXPERTS, TOP_K, renormalise=True)
TARGETS = [Target("bf16", 0), Target("fp8", 128), Target("int8", 32), Target("int4", 64)]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # sums of some hundred float32 products


class Sided(NamedTuple):
    hybrid: HybridExperts
    reference: TorchExperts
    residency: Residency
    layer: native.ExpertLayer


class Divider:
    """Makes layers of random experts, some of them on the device."""

    def __init__(self, *, defers=False, device=None, dtype=torch.float32):
        self.pool = native.Pool(threads=1)
        self.device, self.dtype = device or HostDevice(), dtype
        shape = HandoffShape(MOST_TOKENS, TOP_K, HIDDEN, dtype, defers)
        self.handoff = Handoff(shape, self.device)
        self.num_layers = 0

    def layer(self, resident, *, target=TARGETS[0], num_deferred=0):
        generator = torch.Generator().manual_seed(self.num_layers)
        form, wide = formats.find(target.form), (INNER, HIDDEN)
        layer = self._native(target)
        slots = ExpertSlots(SlotShape(HIDDEN, INNER, target), EXPERTS, device=torch.device("cpu"))
        residency = Residency(EXPERTS, device=torch.device("cpu"))
        stacks = ([], [], [])
        for expert in range(EXPERTS):
            weights = [torch.randn(s, generator=generator) / 8 for s in (wide, wide, wide[::-1])]
            matrices = Matrices(*(form.quantize(weight, target.group) for weight in weights))
            if expert in resident:
                slot = EXPERTS - 1 - expert
                slots.slot(slot).copy_(matrices)
                residency.place(expert, slot)
            else:
                matrices.pack_into(layer, expert)
            for stack, packed in zip(stacks, matrices, strict=True):
                stack.append(form.dequantize(packed, torch.float32))
        lane = self.handoff.lanes[self.num_layers % len(self.handoff.lanes)]
        self.num_layers += 1
        hybrid = HybridExperts(
            HostSide(layer, self.handoff, lane) if len(resident) < EXPERTS else None,
            DeviceSide(residency, slots, self.device) if resident else None,
            max_tokens=MOST_TOKENS,
            num_deferred=num_deferred,
        )
        return Sided(hybrid, TorchExperts(*map(torch.stack, stacks)), residency, layer)

    def _native(self, target):
        return native.ExpertLayer(
            self.pool,
            num_experts=EXPERTS,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            weight_format=target.form,
            group_size=target.group,
            activation=str(self.dtype).removeprefix("torch."),
            max_tokens=MOST_TOKENS,
            max_top_k=TOP_K,
        )


def some_input(num_tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator)
    return x, ROUTER.route(torch.randn(num_tokens, EXPERTS, generator=generator), None)


@pytest.mark.parametrize("resident", [(), (3,), (0, 2, 5, 7), range(EXPERTS)], ids=len)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.form)
def test_both_sides_together_give_what_all_experts_give(target, resident):
    side = Divider().layer(tuple(resident), target=target)
    for num_tokens in (1, 7, MOST_KEPT, MOST_TOKENS, 1, 7):
        x, routing = some_input(num_tokens, seed=num_tokens)
        routing.ids[0, 1] = -1
        out = side.hybrid.forward(x, routing, x.square)
        torch.testing.assert_close(out, side.reference.forward(x, routing, x.square), **TOLERANCE)


def test_in_bfloat16_the_sum_is_rounded_once():
    side = Divider(dtype=torch.bfloat16).layer((1, 4, 6))
    x, routing = some_input(9)
    x, shared = x.bfloat16(), torch.randn(9, HIDDEN).bfloat16()
    out = side.hybrid.forward(x, routing, lambda: shared)
    assert out.dtype is torch.bfloat16
    expected = side.reference.forward(x.float(), routing) + shared.float()
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-7)


def test_an_expert_computes_where_the_table_says_from_the_next_call_on():
    side = Divider().layer((1, 4))
    x, routing = some_input(5)
    expected = side.reference.forward(x, routing)
    torch.testing.assert_close(side.hybrid.forward(x, routing), expected, **TOLERANCE)
    side.residency.evict(4)
    restore(side, 4)
    torch.testing.assert_close(side.hybrid.forward(x, routing), expected, **TOLERANCE)


def test_results_are_not_touched_by_later_calls():
    side = Divider().layer((2,))
    x, routing = some_input(4)
    first = side.hybrid.forward(x, routing)
    kept = first.clone()
    side.hybrid.forward(2 * x, routing)
    assert torch.equal(first, kept)


def test_a_long_prompt_gets_what_steps_get():
    side = Divider().layer((0, 5))
    x, routing = some_input(2 * MOST_TOKENS + 3)
    out = torch.ones(x.shape)
    assert len(list(side.hybrid.stream(x, routing, out))) == 3
    torch.testing.assert_close(out, 1 + side.reference.forward(x, routing), **TOLERANCE)


def test_what_fails_beside_the_host_leaves_nothing_behind():
    side = Divider(defers=True).layer((0, 5), num_deferred=2)

    def fail():
        raise ArithmeticError("of the shared expert")

    x, routing = some_input(6)
    for _ in range(3):
        with Carry() as carry, pytest.raises(ArithmeticError):
            side.hybrid.forward(x, routing, fail, carry)
    expected = side.reference.forward(x, routing)
    torch.testing.assert_close(side.hybrid.forward(x, routing), expected, **TOLERANCE)


def test_what_fails_on_the_host_is_told_once_and_the_next_call_works():
    divider = Divider()
    side = divider.layer((0, 5))
    x, routing = some_input(6)
    expected = side.reference.forward(x, routing)
    for _ in range(2):
        side.layer.clear_expert(2)
        side.hybrid.forward(x, routing)
        with pytest.raises(native.NativeError, match="= 2, but that expert has no weights"):
            divider.device.check_jobs()
        restore(side, 2)
        torch.testing.assert_close(side.hybrid.forward(x, routing), expected, **TOLERANCE)
        divider.device.synchronize()


def restore(side, expert):
    """Pack it on the host, as it was."""
    stacks = (side.reference.gate, side.reference.up, side.reference.down)
    Matrices(*(Packed(stack[expert].bfloat16()) for stack in stacks)).pack_into(side.layer, expert)


@pytest.mark.parametrize("make", [HostDevice, lambda: ShuffledDevice(3)], ids=["host", "shuffled"])
def test_layers_can_be_captured_and_replayed(make):
    divider = Divider(defers=True, device=make())
    sides = [divider.layer(home, num_deferred=home != (6,)) for home in ((1, 2), range(8), (6,))]
    x, routing = some_input(5)
    found = [torch.empty(x.shape) for _ in sides]

    def step():
        with Carry() as carry:
            for side, out in zip(sides, found, strict=True):
                out.copy_(side.hybrid.forward(x, routing, x.square, carry))

    graph = divider.device.capture(step)
    for seed in (1, 2):
        other_x, other_routing = some_input(5, seed)
        for kept, new in zip((x, *routing), (other_x, *other_routing), strict=True):
            kept.copy_(new)
        graph.replay()
        divider.device.synchronize()
        replayed = [out.clone() for out in found]
        step()
        for one, other in zip(replayed, found, strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)


class Deferring:
    """The rule in plain torch, over layers that are each given the same tokens."""

    def __init__(self, sides, num_deferred):
        self.sides, self.num_deferred = sides, num_deferred

    def results(self, inputs):
        owed = 0.0
        for place, (side, (x, routing)) in enumerate(zip(self.sides, inputs, strict=True)):
            late = torch.zeros_like(routing.ids, dtype=torch.bool)
            if place < len(self.sides) - 1:
                late = self.late(side, routing)
            now = routing._replace(weights=routing.weights.masked_fill(late, 0))
            later = routing._replace(weights=routing.weights.masked_fill(~late, 0))
            yield side.reference.forward(x, now) + owed
            owed = side.reference.forward(x, later)

    def late(self, side, routing):
        rows = []
        for ids, weights in zip(routing.ids.tolist(), routing.weights.tolist(), strict=True):
            ranked = sorted(range(TOP_K), key=lambda k: -weights[k])
            late = set(ranked[TOP_K - self.num_deferred :])
            rows.append([k in late and not side.residency.mask[ids[k]] for k in range(TOP_K)])
        return torch.tensor(rows)


@pytest.mark.parametrize("num_deferred", [1, 2, TOP_K])
def test_deferred_experts_come_one_layer_late(num_deferred):
    divider = Divider(defers=True)
    homes = [(1, 2), (), (0, 3, 4, 5), (6,)]
    sides = [
        divider.layer(home, num_deferred=num_deferred * (place < len(homes) - 1))
        for place, home in enumerate(homes)
    ]
    for num_tokens in (1, 5, MOST_TOKENS):
        inputs = [some_input(num_tokens, seed=seed) for seed in range(len(homes))]
        with Carry() as carry:
            found = [s.hybrid.forward(*i, carry=carry) for s, i in zip(sides, inputs, strict=True)]
            assert carry.take() is None
        expected = list(Deferring(sides, num_deferred).results(inputs))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)
        streamed = list(stream_all(sides, inputs))
        for one, other in zip(streamed, expected, strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)


def stream_all(sides, inputs):
    with Carry() as carry:
        for side, (x, routing) in zip(sides, inputs, strict=True):
            out = torch.zeros(x.shape)
            list(side.hybrid.stream(x, routing, out, carry))
            yield out


def test_without_a_carry_nothing_is_deferred():
    side = Divider(defers=True).layer((1,), num_deferred=2)
    x, routing = some_input(3)
    expected = side.reference.forward(x, routing)
    torch.testing.assert_close(side.hybrid.forward(x, routing), expected, **TOLERANCE)


@pytest.mark.parametrize("defers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shape_knows_what_is_allocated(defers, dtype):
    shape = HandoffShape(12, TOP_K, HIDDEN, dtype, defers)
    handoff = Handoff(shape, HostDevice())
    host, device = 0, handoff.counts.nbytes
    for lane in handoff.lanes:
        host += lane.x.nbytes + lane.weights.nbytes + lane.num_tokens.nbytes
        host += sum(errand.ids.nbytes + errand.out.nbytes for errand in lane.errands)
        device += sum(errand.back.nbytes for errand in lane.errands)
    assert (shape.host_bytes, shape.device_bytes) == (host, device)


@pytest.mark.parametrize("first_seed", range(0, 200, 50))
def test_whatever_the_streams_leave_open_results_are_the_same(first_seed):
    """Layers one after the other, as in steps; a job may run as late as its result is needed."""
    homes = [(1, 2), (), (0, 3, 4, 5), (6,)]
    inputs = [[some_input(n, seed=n + place) for place in range(4)] for n in (3, 1, 3)]
    expected = None
    for seed in range(first_seed, first_seed + 50):
        device = ShuffledDevice(seed)
        divider = Divider(defers=True, device=device)
        sides = [divider.layer(home, num_deferred=2 * (home != (6,))) for home in homes]
        found = []
        with device.stirred():
            for step in inputs:
                with Carry() as carry:
                    for side, (x, routing) in zip(sides, step, strict=True):
                        found.append(side.hybrid.forward(x, routing, x.square, carry))
        device.synchronize()
        expected = expected or [one.clone() for one in found]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other), f"seed {seed}"
        divider.pool.close()


@pytest.mark.parametrize("seed", range(20))
def test_what_fails_under_way_leaves_the_streams_in_order(seed):
    """Whatever was still under way when the step failed, the next one finds buffers and jobs."""
    device = ShuffledDevice(seed)
    divider = Divider(defers=True, device=device)
    sides = [divider.layer(home, num_deferred=1) for home in ((0, 5), (1,))]
    inputs = [some_input(5, seed=place) for place in range(2)]

    def fail():
        raise ArithmeticError("of the shared expert")

    def step(beside):
        with Carry() as carry:
            return [
                side.hybrid.forward(x, routing, beside, carry)
                for side, (x, routing) in zip(sides, inputs, strict=True)
            ]

    before = step(None)
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            step(fail)
    for one, other in zip(step(None), before, strict=True):
        assert torch.equal(one, other)
    divider.pool.close()
