"""The routed experts of a layer on both sides, at work at the same time.

The device hands the tokens of the host's experts over, computes its own and the shared expert
meanwhile, and adds up what has come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from kttrio.device.base import Device
from kttrio.experts.block import Beside
from kttrio.experts.carry import Carry, Due, Rows
from kttrio.experts.handoff import HostSide
from kttrio.experts.passing import Passing, RingSide
from kttrio.experts.routing import Routing
from kttrio.experts.slots import NOWHERE, ExpertSlots, Residency
from kttrio.experts.streamed import Part
from kttrio.layers.grouped import grouped_mlp


class DeviceSide:
    """The experts of one layer that live on the device."""

    def __init__(self, residency: Residency, slots: ExpertSlots, device: Device) -> None:
        self.residency, self._slots, self._device = residency, slots, device
        self.served = torch.zeros(1, dtype=torch.int64, device=device.where)
        """Choices that were served here, since the start; on the device."""

    def split(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The slots of choices, -1 where they are on the host, and the others' ids, -1 where they
        are here: ids and both [tokens, top_k] int32."""
        slots = self.residency.slots(ids)
        is_here = slots != NOWHERE
        self.served.add_(is_here.sum())
        return slots, ids.masked_fill(is_here, NOWHERE)

    def forward(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """Their weighted sum, [tokens, hidden] float32; slots [tokens, top_k], -1: not here."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        self.add(x, slots, weights, out)
        return out

    def add(self, x: Tensor, slots: Tensor, weights: Tensor, out: Tensor) -> None:
        """Add that sum to `out`."""
        grouped_mlp(
            x,
            slots,
            weights,
            self._slots.stacks,
            form=self._slots.shape.target.form,
            out=out,
            fixed=self._device.is_capturing,
        )


class Split(NamedTuple):
    """A routing's ids by where they are computed; all [tokens, top_k] int32, -1 for the others."""

    slots: Tensor | None
    """Of experts on the device; None where there never is one."""
    host: tuple[Tensor, ...]
    """Ids of experts on the host, and if some are deferred, the ids of these."""


class HybridExperts:
    """`Experts` of a layer that is divided between the device and the host.

    Against all experts on the host, the same sums are rounded at other places. There the routed
    experts' sum is rounded to the model's dtype, and once more with the shared expert's added. Here
    the host's part is rounded for its way back; the device's part, in float32, the shared expert,
    what was deferred and the host's part are then added in float32, in this order, and the sum is
    rounded once. In float32 only the order of additions differs.

    Without a ring a token's result depends neither on the others nor on how a prompt is cut. With
    one, the tokens of a call decide together which of the host's experts come to the device for it:
    these are then rounded as the device's are.
    """

    def __init__(
        self,
        host: HostSide | None,
        device: DeviceSide | None,
        ring: RingSide | None = None,
        *,
        max_tokens: int,
        num_deferred: int = 0,
    ) -> None:
        """A side is None where no expert lives, now or later, `ring` where none passes through it.
        `max_tokens`: of a call of `forward`. `num_deferred`: see `Division.max_deferred`."""
        self._host, self._device, self._ring = host, device, ring
        self._piece = max_tokens
        self._num_deferred = 0 if host is None else num_deferred

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        beside: Beside | None = None,
        carry: Carry | None = None,
    ) -> Tensor:
        """As `Experts.forward`. What goes wrong on the host is raised where the device is
        synchronised; the result is then of no use."""
        split = self._split(routing, num_deferred=0 if carry is None else self._num_deferred)
        now, *late_ids = split.host
        passing = None if self._ring is None else self._ring.choose(now)
        with Due() as due:
            if carry is not None and (owed := carry.take()) is not None:
                due.add(owed)
            if self._host is not None:
                left = now if passing is None else passing.left
                sent, *late = self._host.start(x, routing.weights, left, *late_ids)
                due.add(sent)
                if carry is not None and late:
                    carry.owe(*late)
            parts = list(self._meanwhile(x, routing.weights, split.slots, passing, beside))
        return _sum([*parts, *due.rows], x.dtype)

    def _meanwhile(
        self,
        x: Tensor,
        weights: Tensor,
        slots: Tensor | None,
        passing: Passing | None,
        beside: Beside | None,
    ) -> Iterator[Tensor]:
        """What the device computes while the host works."""
        if self._device is not None and slots is not None:
            yield self._device.forward(x, slots, weights)
        if beside is not None:
            yield beside()
        if passing is not None:
            yield passing.sum(x, weights)

    def stream(
        self, x: Tensor, routing: Routing, out: Tensor, carry: Carry | None = None
    ) -> Iterator[None]:
        """As `Experts.stream`. Without a ring in pieces that a step might have brought."""
        owed = None if carry is None else carry.take()
        if owed is not None:
            owed.collect()
            out.add_(owed.rows)
        late = torch.zeros_like(out) if carry is not None and self._num_deferred else None
        if self._ring is None:
            yield from self._in_pieces(x, routing, out, late)
        else:
            yield from self._through(self._ring, x, routing, [out] if late is None else [out, late])
        if carry is not None and late is not None:
            carry.owe(Rows(late))

    def _in_pieces(
        self, x: Tensor, routing: Routing, out: Tensor, late: Tensor | None
    ) -> Iterator[None]:
        for rows in _pieces(len(x), self._piece):
            with Carry() as short:
                piece = Routing(routing.ids[rows], routing.weights[rows])
                carry = None if late is None else short
                out[rows].add_(self.forward(x[rows], piece, carry=carry))
                if late is not None and (owed := short.take()) is not None:
                    owed.collect()
                    late[rows].copy_(owed.rows)
            yield

    def _through(
        self, ring: RingSide, x: Tensor, routing: Routing, outs: list[Tensor]
    ) -> Iterator[None]:
        """The host stays free: its experts come to the device, those that are hit. What the
        device has is computed first, while the first of them are copied."""
        with ring.residency.held():
            split = self._split(routing, num_deferred=0 if len(outs) == 1 else self._num_deferred)
            choices = zip(split.host, outs, strict=True)
            parts = [Part(Routing(ids, routing.weights), rows) for ids, rows in choices]
            with closing(ring.stream(ring.hit(routing.ids), x, parts)) as passing:
                next(passing)
                yield from self._add_residents(x, split.slots, routing.weights, outs[0])
                yield from passing
        ring.prefetch_next()

    def _add_residents(
        self, x: Tensor, slots: Tensor | None, weights: Tensor, out: Tensor
    ) -> Iterator[None]:
        if self._device is None or slots is None:
            return
        for rows in _pieces(len(x), self._piece):
            self._device.add(x[rows], slots[rows], weights[rows], out[rows])
            yield

    def _split(self, routing: Routing, *, num_deferred: int) -> Split:
        slots, host = None, routing.ids
        if self._device is not None:
            slots, host = self._device.split(routing.ids)
        if not num_deferred:
            return Split(slots, (host,))
        late = _least(routing.weights, num_deferred)
        return Split(slots, (host.masked_fill(late, NOWHERE), host.masked_fill(~late, NOWHERE)))


def _least(weights: Tensor, number: int) -> Tensor:
    """Which of a token's choices are the `number` of least weight; among equals the last ones.
    weights [tokens, top_k], result the same in bool."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    least = order[:, max(weights.shape[1] - number, 0) :]
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, least, True)


def _sum(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """A new tensor: what is added up, in float32, from the first to the last."""
    first, *others = parts
    if [part.dtype for part in parts] == [dtype, dtype]:  # torch does the same in one operation
        return torch.add(*parts)
    total = first.to(torch.float32, copy=True)
    for part in others:
        total.add_(part)
    return total.to(dtype)


def _pieces(num_tokens: int, size: int) -> Iterator[slice]:
    for begin in range(0, num_tokens, size):
        yield slice(begin, begin + size)
