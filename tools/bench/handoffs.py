"""What a layer pays for asking the host at all: its experts there are next to nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

import torch

from kttrio.device.base import Device
from kttrio.experts.handoff import Handoff, HandoffShape, HostSide
from kttrio.native import ExpertLayer, Pool
from tools.bench.layers import Expert, Shape

NUM_LAYERS = 16
ROUNDS = 30
TOP_K = 10
TINY = Shape(num_experts=1, top_k=TOP_K, hidden_size=2048, intermediate_size=32)


@dataclass(frozen=True, slots=True)
class HandoffCell:
    """Of one token, per layer; microseconds are medians."""

    way: str
    captured: bool
    microseconds: float


class Chain:
    """Layers one after the other, each of which adds to the rows what the host gives."""

    def __init__(self, device: Device, pool: Pool, undo: ExitStack) -> None:
        self.device = device
        shape = HandoffShape(1, TOP_K, TINY.hidden_size, torch.bfloat16, defers=False)
        handoff = Handoff(shape, device)
        layers = [undo.enter_context(_tiny_layer(pool)) for _ in range(NUM_LAYERS)]
        self._hosts = [HostSide(layer, handoff, handoff.lanes[0]) for layer in layers]
        self._x, self._ids, self._weights = (
            torch.zeros(1, size, dtype=dtype, device=device.where)
            for size, dtype in (
                (TINY.hidden_size, torch.bfloat16),
                (TOP_K, torch.int32),
                (TOP_K, torch.float32),
            )
        )
        self._ids[:, 1:] = -1

    def asking(self) -> None:
        for host in self._hosts:
            (sent,) = host.start(self._x, self._weights, self._ids)
            sent.collect()
            self._x.add_(sent.rows)

    def alone(self) -> None:
        for _ in self._hosts:
            self._x.add_(self._x)


def measure_handoff(device: Device, *, way: str, captures: bool) -> list[HandoffCell]:
    """Operation by operation, and where the device `captures`, replayed."""
    with ExitStack() as undo, torch.inference_mode():
        pool = undo.enter_context(Pool())
        chain = Chain(device, pool, undo)
        undo.callback(device.synchronize)
        ways: dict[bool, Callable[[Callable[[], None]], Callable[[], None]]] = {
            False: lambda work: work
        }
        if captures:
            ways[True] = lambda work: device.capture(work).replay
        return [
            HandoffCell(
                way, captured, 1e6 * _difference(device, made(chain.asking), made(chain.alone))
            )
            for captured, made in ways.items()
        ]


def _difference(device: Device, more: Callable[[], None], less: Callable[[], None]) -> float:
    """Seconds of a layer; both in turn, so that what disturbs one disturbs the other."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for work, own in zip((more, less), times, strict=True):
            begun = time.perf_counter()
            work()
            device.synchronize()
            own.append(time.perf_counter() - begun)
    return (median(times[0][1:]) - median(times[1][1:])) / NUM_LAYERS


def _tiny_layer(pool: Pool) -> ExpertLayer:
    layer = ExpertLayer(
        pool,
        num_experts=TINY.num_experts,
        hidden_size=TINY.hidden_size,
        intermediate_size=TINY.intermediate_size,
        weight_format="bf16",
        activation="bfloat16",
        max_tokens=1,
        max_top_k=TOP_K,
    )
    Expert(TINY, "bf16", 0).matrices.pack_into(layer, 0)
    return layer
