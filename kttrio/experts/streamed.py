"""Experts of the host that pass through the device: a ring of slots, filled while others compute.

    feeders   unpack   |   e + 2   |
    copies    copy     |   e + 1   |   each of them some experts, at most half of the ring
    main      compute  |     e     |

Which experts are worth it is decided in costs.py; those that live on the device never come here.
"""

from __future__ import annotations

import concurrent.futures
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kttrio import native
from kttrio.device.base import Device, Event, Stream
from kttrio.experts.costs import Rates
from kttrio.experts.feeders import Feeders, Load
from kttrio.experts.routing import Routing
from kttrio.experts.slots import NOWHERE, ExpertSlots
from kttrio.layers.grouped import grouped_mlp

LEAST_SLOTS = 2
"""Of a ring: one computes while the other is filled."""


class Part(NamedTuple):
    """Some of a call's choices, and where their weighted sum belongs."""

    routing: Routing
    """Its choices of other experts are left out."""
    out: Tensor  # [tokens, hidden] float32


class Ring:
    """The slots that feeders fill, shared by all layers whose experts fit them.

    Which experts share a launch depends on the call and on what was prefetched: sums of float32 may
    be in another order, and results differ by that rounding, by nothing else. Only the thread that
    computes calls it. A call that fails or is given up leaves the ring ready for the next.
    """

    def __init__(self, feeders: Feeders, *, num_experts: int) -> None:
        room = feeders.room
        if len(room) < LEAST_SLOTS:
            raise ValueError(f"a ring of {len(room)} slots, but it needs {LEAST_SLOTS}")
        middle = len(room) // 2
        self.room, self.slots, self.device = room, feeders.slots, feeders.device
        self._feeders, self._main = feeders, feeders.device.main
        self._halves = deque(
            _Half(slots, self.device, num_experts) for slots in (room[:middle], room[middle:])
        )
        """The next one to be filled comes first."""
        self._ahead: deque[_Group] = deque()
        self._past: dict[native.ExpertLayer, Counter[int]] = {}
        self.is_busy = False
        """A call is under way, if only between two of its groups: its layer's experts must stay
        where they are until it is through."""
        self.rates: Rates | None = None
        """What experts cost here, once it is measured."""
        self.num_sent = 0
        """Experts copied to the device, those for nothing too."""
        self.num_wasted = 0
        """Experts that were prefetched for nothing."""

    @property
    def batch(self) -> int:
        """Experts that are unpacked and copied at once."""
        return self._feeders.batch

    @property
    def sent_bytes(self) -> int:
        return self.num_sent * self.slots.shape.nbytes

    def forget(self) -> None:
        """What has passed so far neither counts nor says what may come."""
        self._give_up()
        self._past.clear()
        self.num_sent = self.num_wasted = 0

    def close(self) -> None:
        """End the feeders. Twice is fine."""
        self._give_up()
        self._feeders.close()

    def stream(
        self,
        layer: native.ExpertLayer,
        experts: Sequence[int],
        *,
        x: Tensor,
        parts: Sequence[Part],
    ) -> Generator[None]:
        """Add to each part what these experts of the layer give for x [tokens, hidden].

        All tensors are on the device. Every expert is copied once. Yields when the first copies are
        on their way, and after each group of experts: other work may run then. The device may still
        be at it in the end. RuntimeError while another call is under way.
        """
        if self.is_busy:
            raise RuntimeError("the ring of experts is in use: that call must end first")
        self.is_busy = True
        try:
            self._past.setdefault(layer, Counter()).update(experts)
            left = self._left(layer, experts)
            call = _Call(frozenset(experts), x, parts)
            self._fetch(layer, left)
            yield
            while self._ahead:
                left.extend(self._compute(self._ahead.popleft(), call))
                self._fetch(layer, left)
                yield
        finally:
            self._give_up()
            self.is_busy = False

    def prefetch(self, layer: native.ExpertLayer, experts: Iterable[int]) -> None:
        """Fill the ring, under whatever comes next, with those of these experts that the layer's
        past calls had most. A call for another layer gives them up again."""
        past = self._past.get(layer, Counter())
        likely = sorted(experts, key=past.__getitem__, reverse=True)
        self._fetch(layer, self._left(layer, likely), is_guess=True)

    def _left(self, layer: native.ExpertLayer, experts: Sequence[int]) -> deque[int]:
        """Those experts that are not on their way. What is for another layer is given up."""
        if any(group.layer is not layer for group in self._ahead):
            self._give_up()
        ahead = {expert for group in self._ahead for expert in group.experts}
        return deque(expert for expert in experts if expert not in ahead)

    def _fetch(
        self, layer: native.ExpertLayer, left: deque[int], *, is_guess: bool = False
    ) -> None:
        """Let every half that is free be filled."""
        while left and len(self._ahead) < len(self._halves):
            half = self._halves[0]
            self._halves.rotate()
            experts = [left.popleft() for _ in half.room[: len(left)]]
            loads = [self._load(layer, part, free=half.free) for part in self._parts(half, experts)]
            self._ahead.append(_Group(layer, half, loads, is_guess))

    def _parts(self, half: _Half, experts: list[int]) -> Iterator[dict[int, int]]:
        """Slots by expert, for each of the feeders' batches."""
        for at in range(0, len(experts), self.batch):
            yield dict(zip(experts[at : at + self.batch], half.room[at:], strict=False))

    def _load(
        self, layer: native.ExpertLayer, slots: dict[int, int], *, free: Event | None
    ) -> _Load:
        first = next(iter(slots.values()))
        return _Load(slots, self._feeders.feed(Load(layer, tuple(slots), first, free)))

    def _compute(self, group: _Group, call: _Call) -> list[int]:
        """Let the main stream compute a group. Returns experts that are needed, but could not be
        prefetched: they come once more, and say why if they cannot."""
        there, lost = group.wait(self._main)
        self.num_sent += len(there)
        self.num_wasted += len(there.keys() - call.experts)
        slots = {expert: slot for expert, slot in there.items() if expert in call.experts}
        group.half.run(self._main, slots, partial(_multiply, call, self.slots))
        return [expert for expert in lost if expert in call.experts]

    def _give_up(self) -> None:
        """Nothing is on its way any more. The rest of what is being unpacked is waited for."""
        while self._ahead:
            group = self._ahead.popleft()
            num_copied = group.cancel()
            self.num_sent += num_copied
            self.num_wasted += num_copied if group.is_guess else 0


class _Call(NamedTuple):
    experts: frozenset[int]
    x: Tensor
    parts: Sequence[Part]


class _Load(NamedTuple):
    slots: dict[int, int]  # by expert
    copied: Future[Event]


class _Half:
    """Slots that are filled and computed together."""

    def __init__(self, room: range, device: Device, num_experts: int) -> None:
        self.room = room
        self.free: Event | None = None
        """After the last use of what is in the slots."""
        # One more than experts, never written: what the id -1 of a skipped choice finds.
        self._table = torch.empty(num_experts + 1, dtype=torch.int32, device=device.where)
        self._written = device.pinned(num_experts + 1, dtype=torch.int32)

    def run(self, main: Stream, slots: dict[int, int], multiply: Callable[[Tensor], None]) -> None:
        """`multiply` takes a table of slots by expert, -1 for all others."""
        if self.free is not None:
            self.free.synchronize()  # the table's last copy is over
        self._written.fill_(NOWHERE)
        self._written[list(slots)] = torch.tensor(list(slots.values()), dtype=torch.int32)
        try:
            main.run(partial(self._table.copy_, self._written, non_blocking=True))
            main.run(partial(multiply, self._table))
        finally:  # a part of it may have been handed over
            self.free = main.record()


class _Group(NamedTuple):
    """Experts that share a launch."""

    layer: native.ExpertLayer
    half: _Half
    loads: list[_Load]
    is_guess: bool

    @property
    def experts(self) -> Iterator[int]:
        return (expert for load in self.loads for expert in load.slots)

    def wait(self, main: Stream) -> tuple[dict[int, int], list[int]]:
        """Let the main stream wait for the copies: slots by expert, and what of a guess failed."""
        there: dict[int, int] = {}
        lost: list[int] = []
        for load in self.loads:
            if self.is_guess and load.copied.exception() is not None:
                lost += load.slots
            else:
                main.wait(load.copied.result())
                there |= load.slots
        return there, lost

    def cancel(self) -> int:
        """Once it returns nothing is written any more; the number of experts copied."""
        going = [load for load in self.loads if not load.copied.cancel()]
        concurrent.futures.wait([load.copied for load in going])
        return sum(len(load.slots) for load in going if load.copied.exception() is None)


def _multiply(call: _Call, slots: ExpertSlots, table: Tensor) -> None:
    form = slots.shape.target.form
    for (ids, weights), out in call.parts:
        grouped_mlp(call.x, table[ids.long()], weights, slots.stacks, form=form, out=out)
