"""Threads that bring experts from the library's memory into slots of the device.

A feeder unpacks a few experts into pinned memory, which is small enough to stay in the processor's
cache, and hands their copy to a stream of its own. Who computes them is not known here.
"""

from __future__ import annotations

import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from queue import SimpleQueue
from threading import Lock
from typing import NamedTuple

import torch

from kttrio import native
from kttrio.device.base import Device, Event
from kttrio.experts.slots import ExpertSlots, SlotShape
from kttrio.experts.source import Matrices

_MOST_FEEDERS = 8
_THREADS_PER_FEEDER = 8  # of the pool, which decodes meanwhile
_BEING_COPIED = 2  # stagings, while each feeder fills another
_STAGING_BYTES = 8 * 2**20  # all of them fit a large cache, and Python's share is small
_LEAST_LOADS = 4  # that a half of the ring is filled with: several at a time
_NAP = 50e-6  # seconds: less than a copy takes


def num_feeders(pool_threads: int) -> int:
    """How many threads unpack beside a pool of so many: two at least, for one waits at times."""
    return max(2, min(_MOST_FEEDERS, pool_threads // _THREADS_PER_FEEDER))


def batch_size(expert_bytes: int, num_slots: int) -> int:
    """Experts of a ring of so many slots that are unpacked and copied at once."""
    return max(1, min(_STAGING_BYTES // expert_bytes, num_slots // 2 // _LEAST_LOADS))


def most_staging_bytes(expert_bytes: int, num_slots: int) -> int:
    """Pinned memory that the feeders of such a ring take, however many threads there are."""
    num_stagings = _MOST_FEEDERS + _BEING_COPIED
    return num_stagings * batch_size(expert_bytes, num_slots) * expert_bytes


class Load(NamedTuple):
    """Neighbouring slots, the experts of a layer that are to fill them, and when they may."""

    layer: native.ExpertLayer
    experts: tuple[int, ...]  # at most `batch` of them
    first_slot: int
    free: Event | None
    """After the last use of what is in the slots."""


class Feeders:
    """Fill slots, in the order in which they are told to as far as they get on alike.

    `room` are the slots that they ever fill. `threads` runs what they do, and ends with them;
    default: threads of their own.
    """

    def __init__(
        self,
        slots: ExpertSlots,
        room: range,
        device: Device,
        *,
        pool_threads: int,
        threads: Executor | None = None,
    ) -> None:
        count = num_feeders(pool_threads)
        self.slots, self.room, self.device = slots, room, device
        self.batch = batch_size(slots.shape.nbytes, len(room))
        self._threads = threads or ThreadPoolExecutor(count, thread_name_prefix="feeder")
        self._stagings: SimpleQueue[_Staging] = SimpleQueue()  # the one longest out of use first
        for _ in range(count + _BEING_COPIED):
            self._stagings.put(_Staging(slots.shape, self.batch, device))
        self._rooms: dict[tuple[int, int], Matrices] = {}
        self._copies = device.open_stream("experts")
        self._handing = Lock()  # a stream is handed work by one thread at a time

    def feed(self, load: Load) -> Future[Event]:
        """The event after which the experts are in their slots; or what went wrong, and then the
        slots hold anything, but nothing is written to them any more."""
        return self._threads.submit(self._feed, load)

    def close(self) -> None:
        """End the threads and wait for copies under way. Twice is fine."""
        self._threads.shutdown(cancel_futures=True)
        while not self._stagings.empty():
            self._stagings.get().wait()

    @torch.inference_mode()  # the slots may have been made in it
    def _feed(self, load: Load) -> Event:
        staging = self._stagings.get()
        try:
            staging.wait()
            staging.unpack(load)
            with self._handing:
                return self._copy(staging, load)
        finally:
            self._stagings.put(staging)

    def _copy(self, staging: _Staging, load: Load) -> Event:
        if load.free is not None:
            self._copies.wait(load.free)
        num_experts = len(load.experts)
        target = self._room(load.first_slot, load.first_slot + num_experts)
        try:
            self._copies.run(partial(target.copy_, staging.first(num_experts)))
        finally:  # some of it may be under way even then
            staging.copied = self._copies.record()
        return staging.copied

    def _room(self, begin: int, end: int) -> Matrices:
        """Some slots; views are kept, for making them takes as long as a small copy."""
        if (begin, end) not in self._rooms:
            self._rooms[begin, end] = self.slots.stacks.map(itemgetter(slice(begin, end)))
        return self._rooms[begin, end]


class _Staging:
    """Pinned memory for a few experts."""

    def __init__(self, shape: SlotShape, batch: int, device: Device) -> None:
        def room(tensor: torch.Tensor) -> torch.Tensor:
            return device.pinned(batch, *tensor.shape, dtype=tensor.dtype)

        stacks = shape.outline().map(room)
        numbers = range(batch)
        self._experts = [stacks.map(itemgetter(at)) for at in numbers]
        self._firsts = [stacks.map(itemgetter(slice(at + 1))) for at in numbers]
        self.copied: Event | None = None

    def wait(self) -> None:
        """Until what was in it has been copied; asleep, for the cores belong to the pool."""
        copied, self.copied = self.copied, None
        if copied is None:
            return
        while not copied.is_done:
            time.sleep(_NAP)
        copied.synchronize()  # raises what went wrong

    def unpack(self, load: Load) -> None:
        for room, expert in zip(self._experts, load.experts, strict=False):
            room.unpack_from(load.layer, expert)

    def first(self, num_experts: int) -> Matrices:
        """What `unpack` fills for so many, one at least."""
        return self._firsts[num_experts - 1]
