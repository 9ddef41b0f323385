"""Rings for layers of small random experts, and threads that are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kttrio.device.base import Device
from kttrio.device.host import HostDevice
from kttrio.experts.feeders import Feeders
from kttrio.experts.routing import Routing
from kttrio.experts.slots import ExpertSlots, SlotShape
from kttrio.experts.streamed import Part, Ring
from kttrio.native import ExpertLayer, Pool
from kttrio.weights.quantize import Target
from tests.native.expert_reference import (
    BF16,
    Expert,
    Kind,
    expected,
    make_layer,
    random_experts,
    random_input,
    random_routing,
)

HIDDEN, INNER, NUM_EXPERTS, TOKENS, TOP_K = 64, 96, 13, 24, 3
ALL = tuple(range(NUM_EXPERTS))


class AtOnce(Executor):
    """Does what it is given at once, in the calling thread."""

    def submit(self, work: Callable, /, *args: object, **named: object) -> Future:
        future: Future = Future()
        try:
            future.set_result(work(*args, **named))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass
class Machine:
    """Layers of the host, and a ring on the device."""

    device: Device
    ring: Ring
    layers: list[ExpertLayer]
    experts: list[list[Expert]]

    def stream(self, experts=ALL, *, layer: int = 0, seed: int = 0) -> tuple:
        """Let experts pass for a call drawn from the seed: what comes out, and what should."""
        call = self.begin(experts, layer=layer, seed=seed)
        for _ in call.steps:
            pass
        self.device.synchronize()
        return call.out, call.wanted

    def begin(self, experts=ALL, *, layer: int = 0, seed: int = 0) -> Call:
        x = random_input(TOKENS, HIDDEN, seed=seed, dtype=torch.float32)
        ids, weights = random_routing(TOKENS, TOP_K, NUM_EXPERTS, seed=seed + 1)
        out = torch.zeros(TOKENS, HIDDEN)
        here = torch.isin(ids, torch.tensor(experts, dtype=torch.int32))
        wanted = expected(self.experts[layer], x, ids.where(here, -1), weights)
        parts = [Part(Routing(ids, weights), out)]
        steps = self.ring.stream(self.layers[layer], experts, x=x, parts=parts)
        return Call(steps, out, wanted)


@dataclass
class Call:
    steps: Iterator[None]
    out: torch.Tensor
    wanted: torch.Tensor


@contextmanager
def machine(
    kind: Kind = BF16,
    *,
    device: Device | None = None,
    num_slots: int = 6,
    num_layers: int = 1,
    num_settled: int = 1,
    threads: Executor | None = None,
) -> Iterator[Machine]:
    """The ring's slots come after those that are settled."""
    device = device or HostDevice()
    shape = SlotShape(HIDDEN, INNER, Target(kind.weight_format, kind.group_size))
    experts = [
        random_experts(NUM_EXPERTS, HIDDEN, INNER, kind=kind, seed=n) for n in range(num_layers)
    ]
    slots = ExpertSlots(shape, num_settled + num_slots, device=device.where)
    room = range(num_settled, slots.num_slots)
    feeders = Feeders(slots, room, device, pool_threads=1, threads=threads)
    ring = Ring(feeders, num_experts=NUM_EXPERTS)
    with Pool(threads=1) as pool:
        layers = [make_layer(pool, one, activation="float32", max_tokens=128) for one in experts]
        try:
            yield Machine(device, ring, layers, experts)
        finally:
            ring.close()
            for layer in layers:
                layer.close()
