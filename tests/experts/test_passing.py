"""Layers whose experts of the host may pass through the ring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kttrio.device.host import HostDevice
from kttrio.experts import passing
from kttrio.experts.carry import Carry
from kttrio.experts.costs import Rates
from kttrio.experts.handoff import Handoff, HandoffShape, HostSide
from kttrio.experts.hybrid import DeviceSide, HybridExperts
from kttrio.experts.passing import RingSide
from kttrio.experts.routing import Routing
from kttrio.experts.slots import Residency
from kttrio.native import NativeError
from tests.divided import divide, load_divided
from tests.experts.rings import HIDDEN, NUM_EXPERTS, TOP_K, Machine, machine
from tests.golden import FIXTURES
from tests.native.expert_reference import (
    BF16,
    KINDS,
    expected,
    random_input,
    random_routing,
    relative_error,
)

TOKENS, PIECE = 100, 32
EXACT = 4e-6
RESIDENT = (0, 5, 12)
HERE = Rates(1.0, 1.0, 1e-9, 1e-9, 1e-9)
"""Everything had better pass."""
THERE = Rates(1e-9, 1e-9, 1.0, 1e-9, 1e-9)


class Divided:
    """Hybrid layers over a machine's."""

    def __init__(self, made: Machine, *, num_deferred: int = 0) -> None:
        self.made = made
        shape = HandoffShape(TOKENS, TOP_K, HIDDEN, torch.float32, num_deferred > 0)
        handoff = Handoff(shape, made.device)
        self.residencies = [Residency(NUM_EXPERTS, device=made.device.where) for _ in made.layers]
        self.rings = [
            RingSide(made.ring, layer, residency)
            for layer, residency in zip(made.layers, self.residencies, strict=True)
        ]
        for ring, following in zip(self.rings, self.rings[1:], strict=False):
            ring.next = following
        self.layers = [
            HybridExperts(
                HostSide(layer, handoff, handoff.lanes[number % len(handoff.lanes)]),
                DeviceSide(self.residencies[number], made.ring.slots, made.device),
                self.rings[number],
                max_tokens=TOKENS,
                num_deferred=num_deferred if number < len(made.layers) - 1 else 0,
            )
            for number, layer in enumerate(made.layers)
        ]
        for layer in range(len(made.layers)):
            self._settle(layer)

    def _settle(self, layer: int) -> None:
        for slot, expert in enumerate(RESIDENT):
            place = slot + len(RESIDENT) * layer
            self.made.ring.slots.slot(place).unpack_from(self.made.layers[layer], expert)
            self.made.layers[layer].clear_expert(expert)
            self.residencies[layer].place(expert, place)

    def reference(self, layer: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return expected(self.made.experts[layer], x, *routing)


@contextmanager
def divided(kind=BF16, *, num_layers=1, num_deferred=0, **named) -> Iterator[Divided]:
    settled = len(RESIDENT) * num_layers
    with machine(kind, num_layers=num_layers, num_settled=settled, **named) as made:
        yield Divided(made, num_deferred=num_deferred)


def some_call(seed=0):
    x = random_input(TOKENS, HIDDEN, seed=seed, dtype=torch.float32)
    ids, weights = random_routing(TOKENS, TOP_K, NUM_EXPERTS, seed=seed + 1)
    return x, Routing(ids, weights)


def close(out, wanted):
    return relative_error(out, wanted) < EXACT


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rates", [HERE, THERE, Rates(1e-6, 1e-6, 20e-6, 1e-6, 1e-7), None])
def test_wherever_a_call_is_computed_it_is_the_same(kind, rates):
    with divided(kind) as made:
        made.made.ring.rates = rates
        x, routing = some_call()
        wanted = made.reference(0, x, routing) + x.square()
        assert close(made.layers[0].forward(x, routing, x.square), wanted)
        sent = made.made.ring.num_sent
        of_host = NUM_EXPERTS - len(RESIDENT)
        assert {HERE: sent == of_host, THERE: sent == 0, None: sent == 0}.get(rates, sent > 0)


def test_a_small_call_does_not_look():
    with divided() as made:
        made.made.ring.rates = HERE
        x, routing = some_call()
        few = Routing(*(tensor[: passing.LEAST_TOKENS - 1] for tensor in routing))
        made.layers[0].forward(x[: passing.LEAST_TOKENS - 1], few)
        assert made.made.ring.num_sent == 0


def test_a_long_prompt_has_each_expert_of_the_host_sent_once_whatever_its_length():
    with divided() as made:
        x, routing = some_call()
        x, routing = x.repeat(9, 1), Routing(*(tensor.repeat(9, 1) for tensor in routing))
        out = torch.ones(x.shape)
        assert len(list(made.layers[0].stream(x, routing, out))) > 9
        assert close(out, made.reference(0, x, routing) + 1)
        assert made.made.ring.num_sent == NUM_EXPERTS - len(RESIDENT)


def test_experts_that_nobody_chose_are_not_sent():
    with divided() as made:
        x, routing = some_call()
        routing = Routing(routing.ids.where(routing.ids < 8, -1), routing.weights)
        out = torch.zeros(x.shape)
        list(made.layers[0].stream(x, routing, out))
        assert close(out, made.reference(0, x, routing))
        assert made.made.ring.num_sent == 6, "1, 2, 3, 4, 6 and 7"


def test_the_next_layer_begins_under_what_comes_before_it():
    with divided(num_layers=3) as made:
        for layer, experts in enumerate(made.layers):
            x, routing = some_call(layer)
            out = torch.zeros(x.shape)
            list(experts.stream(x, routing, out))
            assert close(out, made.reference(layer, x, routing))
        ring = made.made.ring
        assert ring.num_sent == 3 * (NUM_EXPERTS - len(RESIDENT))
        assert ring.num_wasted == 0


def test_others_leave_the_ring_to_a_long_prompt():
    with divided() as made:
        made.made.ring.rates = HERE
        x, routing = some_call()
        out = torch.zeros(x.shape)
        other, other_routing = some_call(seed=5)
        wanted = made.reference(0, other, other_routing)
        for _ in made.layers[0].stream(x, routing, out):
            assert close(made.layers[0].forward(other, other_routing), wanted)
        assert close(out, made.reference(0, x, routing))
        assert made.made.ring.num_sent == NUM_EXPERTS - len(RESIDENT)


def test_tables_are_held_while_a_long_prompt_passes():
    with divided() as made:
        out = torch.zeros(TOKENS, HIDDEN)
        residency = made.residencies[0]
        assert not residency.is_held
        for number, _ in enumerate(made.layers[0].stream(*some_call(), out)):
            assert residency.is_held
            last = number
        assert not residency.is_held
        units = made.layers[0].stream(*some_call(), out)
        for _ in range(last):
            next(units)
        units.close()
        assert not residency.is_held
        assert not made.made.ring.is_busy


@pytest.mark.parametrize("through_the_ring", [True, False])
def test_deferred_experts_come_a_layer_late_by_whichever_way(through_the_ring):
    """As two layers give that never meet the ring."""
    with divided(num_layers=2, num_deferred=1) as made:
        calls = [some_call(seed) for seed in range(2)]
        with Carry() as carry:
            wanted = [
                layer.forward(*call, carry=carry)
                for layer, call in zip(made.layers, calls, strict=True)
            ]
        made.made.ring.rates = HERE
        with Carry() as carry:
            for layer, (x, routing), one in zip(made.layers, calls, wanted, strict=True):
                out = torch.zeros(x.shape)
                if through_the_ring:
                    list(layer.stream(x, routing, out, carry))
                else:
                    out = layer.forward(x, routing, carry=carry)
                torch.testing.assert_close(out, one, rtol=1e-5, atol=1e-5)
        assert made.made.ring.num_sent > 0


@pytest.mark.parametrize("way", ["forward", "stream"])
def test_an_expert_that_is_lost_fails_the_call_and_no_other(way):
    with divided() as made:
        made.made.ring.rates = HERE
        made.made.layers[0].clear_expert(3)
        layer, out = made.layers[0], torch.zeros(TOKENS, HIDDEN)
        x, routing = some_call()

        def compute(routing):
            if way == "stream":
                list(layer.stream(x, routing, out))
                return out
            return layer.forward(x, routing)

        with pytest.raises(NativeError, match="expert 3 has no weights here"):
            compute(routing)
        made.made.device.synchronize()
        assert not made.residencies[0].is_held
        others = Routing(routing.ids.where(routing.ids != 3, -1), routing.weights)
        out.zero_()
        assert close(compute(others), made.reference(0, x, others))


def test_while_a_step_is_captured_nothing_is_looked_at():
    device = HostDevice()
    with divided(device=device) as made:
        made.made.ring.rates = HERE
        x, routing = some_call()
        out = torch.zeros(x.shape)
        graph = device.capture(lambda: out.copy_(made.layers[0].forward(x, routing)))
        graph.replay()
        device.synchronize()
        assert close(out, made.reference(0, x, routing))
        assert made.made.ring.num_sent == 0


@pytest.mark.parametrize("ratio", [0, 0.3, 0.7])
@pytest.mark.parametrize("fixture", ["qwen3_next", "qwen3_next_fp8"])
@torch.inference_mode()
def test_a_prompt_costs_each_expert_of_the_host_that_it_hits_once_in_every_layer(fixture, ratio):
    """Of a loaded model, and whole prompts beside those of another bank."""
    model, whole = (
        load_divided(FIXTURES / fixture, division)
        for division in (divide(FIXTURES / fixture, ratio, "random", num_ring_slots=4), None)
    )
    ring, num_hit = model.bank.sides.ring, 0
    ring.forget()  # what was checked at the start
    pairs = zip(model.moe_blocks().items(), whole.moe_blocks().values(), strict=True)
    for number, ((_, block), other) in enumerate(pairs):
        chosen = []
        block.listeners.append(chosen.append)
        x = torch.randn(150, model.shape.hidden_size)
        out = torch.empty_like(x)
        list(block.stream(x, out, piece=64))
        torch.testing.assert_close(out, other.forward(x), rtol=1e-4, atol=1e-5)
        mask = model.bank.sides.residencies[number].mask
        num_hit += int((~mask[torch.cat(chosen).unique().long()]).sum())
    assert ring.num_sent - ring.num_wasted == num_hit
    assert ring.num_wasted <= 4 * number, "a ring for each layer but the first"
    model.close()
    whole.close()
