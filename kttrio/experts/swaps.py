"""Carries swaps out beside the steps: one expert goes to the device, another back to the host.

    promoted   host layer -> pinned staging -> spare slot   its table says so   host copy is freed
    demoted    its slot   -> pinned staging -> host layer   its table says so   slot is spare now

The tables change between two steps, once both copies are there. So at every moment each expert is
where its table says, whatever goes wrong on the way. Which experts swap is decided in choice.py.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kttrio import native
from kttrio.device.base import Device
from kttrio.experts.choice import Swap, swapped
from kttrio.experts.slots import ExpertSlots, Residency, pinned_expert
from kttrio.experts.source import Matrices


class TwoSides(NamedTuple):
    """Where one layer's experts are."""

    host: native.ExpertLayer
    residency: Residency


@dataclass(slots=True)
class _Lane:
    """What one swap needs for itself."""

    spare: int
    """A slot that no table names."""
    up: Matrices
    down: Matrices


class Swapper:
    """A few swaps at a time, between the layers of one slab of slots.

    Unpacking and packing on the host are left to a thread of its own, copies to a stream of their
    own. `begin`, `advance` and `close` belong to the thread of the steps, and between two of them.
    """

    def __init__(
        self,
        layers: Sequence[TwoSides],
        slots: ExpertSlots,
        *,
        spares: Sequence[int],
        device: Device,
    ) -> None:
        """`spares`: slots that no table names. There are as many swaps at a time, at most."""
        self._layers, self._slots, self._device = layers, slots, device
        self._lanes = [
            _Lane(spare, *(pinned_expert(slots.shape, device) for _ in range(2)))
            for spare in spares
        ]
        self._stream = device.open_stream("swaps")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="swaps")
        self._running: list[Generator[None]] = []
        self.mask = torch.stack([layer.residency.mask for layer in layers])
        """[layers, experts] bool: who lives on the device, by the tables."""
        self.num_done = 0
        """Swaps since the start."""

    @property
    def num_lanes(self) -> int:
        """Swaps that may be under way at a time."""
        return len(self._lanes) + len(self._running)

    @property
    def is_idle(self) -> bool:
        return not self._running

    def begin(self, swaps: Sequence[Swap]) -> None:
        """Start them: at most `num_lanes` less those that run, of experts that are in none yet."""
        self._running += [self._carry_out(swap, self._lanes.pop()) for swap in swaps]

    def advance(self) -> None:
        """Take every swap as far as it can go now, waiting for nothing.

        Raises what went wrong, and the swap it happened in is then undone.
        """
        for swap in list(self._running):
            try:
                next(swap)
            except StopIteration:
                self._running.remove(swap)

    def abandon(self) -> None:
        """Undo the swaps that are under way."""
        for swap in self._running:
            swap.close()
        self._running.clear()

    def close(self) -> None:
        """Abandon what is under way and end the thread. Twice is fine."""
        self.abandon()
        self._thread.shutdown()

    def _carry_out(self, swap: Swap, lane: _Lane) -> Generator[None]:
        (up, rising), (down, falling) = (
            (self._layers[seat.layer], seat.expert) for seat in (swap.promoted, swap.demoted)
        )
        slot = int(down.residency.host_slot_of[falling])
        read = self._thread.submit(lane.up.unpack_from, up.host, rising)
        yield from self._copied(lane.down, self._slots.slot(slot))
        yield from _done(read)
        written = self._thread.submit(lane.down.pack_into, down.host, falling)
        try:
            yield from self._copied(self._slots.slot(lane.spare), lane.up)
            yield from _done(written)
            while up.residency.is_held or down.residency.is_held:
                yield
            up.residency.place(rising, lane.spare)
        except BaseException:
            self._thread.submit(down.host.clear_expert, falling)
            raise
        down.residency.evict(falling)
        self.mask = swapped(self.mask, [swap])
        yield from _done(self._thread.submit(up.host.clear_expert, rising))
        self._lanes.append(_Lane(slot, lane.up, lane.down))
        self.num_done += 1

    def _copied(self, target: Matrices, source: Matrices) -> Generator[None]:
        """Copy after all that the steps so far do with either."""
        self._stream.wait(self._device.main.record())
        self._stream.run(lambda: target.copy_(source))
        event = self._stream.record()
        while not event.is_done:
            yield
        event.synchronize()


def _done(work: Future[None]) -> Generator[None]:
    while not work.done():
        yield
    work.result()
