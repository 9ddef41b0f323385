"""The routed experts of a layer on both sides, at work at the same time.

The device hands the tokens of the host's experts over, computes its own and the shared expert
meanwhile, and adds up what has come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from kttrio.device.base import Device
from kttrio.experts.block import Beside
from kttrio.experts.carry import Carry, Rows
from kttrio.experts.handoff import HostSide
from kttrio.experts.passing import Passing
from kttrio.experts.routing import Routing
from kttrio.experts.slots import NOWHERE, ExpertSlots, Residency
from kttrio.experts.streamed import Part
from kttrio.layers.grouped import grouped_mlp


class DeviceSide:
    """The experts of one layer that live on the device."""

    def __init__(self, residency: Residency, slots: ExpertSlots, device: Device) -> None:
        self.residency, self._slots, self._device = residency, slots, device

    def add(self, x: Tensor, slots: Tensor, weights: Tensor, out: Tensor) -> None:
        """Add their weighted sum to `out` [tokens, hidden] float32; slots [tokens, top_k], -1 for
        who is not here."""
        stacks, form = self._slots.stacks, self._slots.shape.target.form
        fixed = self._device.is_capturing
        grouped_mlp(x, slots, weights, stacks, form=form, out=out, fixed=fixed)


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
    the host's part and what was deferred are then added in float32, in this order, and the sum is
    rounded once. In float32 only the order of additions differs.

    Which experts a token meets, and which of them are deferred, depends neither on other tokens nor
    on how a prompt is cut.
    """

    def __init__(
        self,
        host: HostSide,
        device: DeviceSide | None,
        *,
        num_deferred: int = 0,
        passing: Passing | None = None,
    ) -> None:
        """`device` is None where no expert lives on it, now or later; `passing` where there is no
        ring. `num_deferred`: see `Division.max_deferred`."""
        self._host, self._device, self._passing = host, device, passing
        self._num_deferred = num_deferred

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        beside: Beside | None = None,
        carry: Carry | None = None,
    ) -> Tensor:
        """As `Experts.forward`. What goes wrong on the host is raised where the device is
        synchronised; the result is then of no use."""
        slots, host = self._split(routing, num_deferred=0 if carry is None else self._num_deferred)
        owed = None if carry is None else carry.take()
        parts: list[Tensor] = []
        with ExitStack() as under_way:
            if owed is not None:
                under_way.callback(owed.collect)
            passers = self._choose(routing.ids, host)
            sent, *late = self._host.start(x, routing.weights, *_without(passers, host))
            under_way.callback(sent.collect)
            if carry is not None and late:
                carry.owe(*late)
            if slots is not None or passers:
                here = Routing(host[0], routing.weights)
                parts.append(self._on_device(x, slots, here, passers))
            if beside is not None:
                parts.append(beside())
        parts.append(sent.rows)
        return _sum(parts if owed is None else [*parts, owed.rows], x.dtype)

    def stream(
        self, x: Tensor, routing: Routing, out: Tensor, carry: Carry | None = None
    ) -> Iterator[None]:
        """As `Experts.stream`; without a ring in pieces that a step might have brought."""
        owed = None if carry is None else carry.take()
        if owed is not None:
            owed.collect()
            out.add_(owed.rows)
        late = None
        if carry is not None and self._num_deferred:
            late = torch.zeros_like(out)
        if self._passing is None:
            yield from self._stream_pieces(x, routing, out, late)
        else:
            yield from self._stream_experts(self._passing, x, routing, out, late)
        if carry is not None and late is not None:
            carry.owe(Rows(late))

    def _stream_pieces(
        self, x: Tensor, routing: Routing, out: Tensor, late: Tensor | None
    ) -> Iterator[None]:
        for rows in _pieces(len(x), self._host.max_tokens):
            piece = Routing(routing.ids[rows], routing.weights[rows])
            with Carry() as short:
                result = self.forward(x[rows], piece, carry=None if late is None else short)
                owed = short.take()
            out[rows].add_(result)
            if owed is not None and late is not None:
                owed.collect()
                late[rows].copy_(owed.rows)
            yield

    def _stream_experts(
        self, passing: Passing, x: Tensor, routing: Routing, out: Tensor, late: Tensor | None
    ) -> Iterator[None]:
        slots, host = self._split(routing, num_deferred=0 if late is None else self._num_deferred)
        for rows in _pieces(len(x), self._host.max_tokens):
            if self._device is not None and slots is not None:
                self._device.add(x[rows], slots[rows], routing.weights[rows], out[rows])
                yield
        sums = (out,) if late is None else (out, late)
        parts = [
            Part(Routing(ids, routing.weights), total)
            for ids, total in zip(host, sums, strict=True)
        ]
        yield from passing.run_all(routing.ids, x=x, parts=parts)

    def _split(self, routing: Routing, *, num_deferred: int) -> Split:
        slots, host = None, routing.ids
        if self._device is not None:
            slots = self._device.residency.slots(routing.ids)
            host = host.masked_fill(slots != NOWHERE, NOWHERE)
        if not num_deferred:
            return Split(slots, (host,))
        late = _least(routing.weights, num_deferred)
        return Split(slots, (host.masked_fill(late, NOWHERE), host.masked_fill(~late, NOWHERE)))

    def _choose(self, ids: Tensor, host: tuple[Tensor, ...]) -> tuple[int, ...]:
        """Experts of the host that this call has on the device. What is deferred stays."""
        if self._passing is None or not self._passing.pays(len(ids)):
            return ()
        for late in host[1:]:
            ids = ids.masked_fill(late != NOWHERE, NOWHERE)
        return self._passing.choose(ids)

    def _on_device(
        self, x: Tensor, slots: Tensor | None, others: Routing, passers: tuple[int, ...]
    ) -> Tensor:
        """What residents give, and of the `others` those who pass: [tokens, hidden] float32."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if self._device is not None and slots is not None:
            self._device.add(x, slots, others.weights, out)
        if self._passing is not None and passers:
            for _ in self._passing.run(passers, x=x, parts=[Part(others, out)]):
                pass
        return out


def _without(passers: tuple[int, ...], host: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The host's ids, but for those who pass through the device."""
    if not passers:
        return host
    now, *late = host
    passes = torch.isin(now, torch.tensor(passers, dtype=now.dtype, device=now.device))
    return (now.masked_fill(passes, NOWHERE), *late)


def _least(weights: Tensor, number: int) -> Tensor:
    """Which of a token's choices are the `number` of least weight; among equals the last ones.
    weights [tokens, top_k], result the same in bool."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    least = order[:, max(weights.shape[1] - number, 0) :]
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, least, True)


def _sum(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """A new tensor: what is added up, in float32, from the first to the last."""
    first, *others = parts
    total = first.to(torch.float32, copy=True)
    for part in others:
        total.add_(part)
    return total.to(dtype)


def _pieces(num_tokens: int, size: int) -> Iterator[slice]:
    for begin in range(0, num_tokens, size):
        yield slice(begin, begin + size)
