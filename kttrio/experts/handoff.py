"""Tokens on their way to the experts on the host and back: buffers, jobs, and their order.

All of it runs on one side stream; buffers and most jobs are made once, so that a captured step
finds them where they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kttrio import native
from kttrio.device.base import Device, Stream

MOST_KEPT = 64
"""Calls of so many tokens, and fewer, have jobs of their own, made when they first come. Larger
ones share a job, which is told their number: that is one more copy."""

_COUNT_BYTES = 4  # of an id, a weight or a number of tokens


@dataclass(frozen=True, slots=True)
class HandoffShape:
    """The largest call, and how many jobs it may be dealt to."""

    max_tokens: int
    max_top_k: int
    hidden_size: int
    dtype: torch.dtype
    """float32 or bfloat16, of the rows."""
    defers: bool

    @property
    def host_bytes(self) -> int:
        """Of pinned memory."""
        choices = 2 * self.max_top_k * _COUNT_BYTES
        late = self._row_bytes + choices // 2 if self.defers else 0
        per_token = 2 * self._row_bytes + choices + late
        return self.num_lanes * (self.max_tokens * per_token + _COUNT_BYTES)

    @property
    def device_bytes(self) -> int:
        per_token = self.num_lanes * (1 + self.defers) * self._row_bytes
        return self.max_tokens * per_token + (self.max_tokens + 1) * _COUNT_BYTES

    @property
    def num_lanes(self) -> int:
        """Deferred experts still read one layer's tokens while the next one's come."""
        return 2 if self.defers else 1

    @property
    def _row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize


class Errand(NamedTuple):
    """What belongs to one job, for the most tokens that there can be."""

    ids: Tensor  # [tokens, top_k] int32, pinned
    out: Tensor  # [tokens, hidden], pinned
    back: Tensor  # the same on the device


class Lane(NamedTuple):
    """One layer's tokens on the host."""

    x: Tensor  # [tokens, hidden], pinned
    weights: Tensor  # [tokens, top_k] float32, pinned
    num_tokens: Tensor  # [1] int32, pinned: for jobs that are shared
    errands: tuple[Errand, ...]  # one; with deferral a second, for what is deferred


class Handoff:
    """The buffers of all layers, and the stream on which their tokens travel.

    Layers take turns with the lanes. Everything is allocated, and touched, here.
    """

    def __init__(self, shape: HandoffShape, device: Device) -> None:
        self.shape, self.device = shape, device
        self.stream: Stream = device.open_stream("host experts")
        self.counts = torch.arange(shape.max_tokens + 1, dtype=torch.int32, device=device.where)
        self.lanes = [self._lane() for _ in range(shape.num_lanes)]

    def _lane(self) -> Lane:
        tokens, hidden, top_k = self.shape.max_tokens, self.shape.hidden_size, self.shape.max_top_k
        return Lane(
            x=self._pinned(tokens, hidden, dtype=self.shape.dtype),
            weights=self._pinned(tokens, top_k, dtype=torch.float32),
            num_tokens=self._pinned(1, dtype=torch.int32),
            errands=tuple(self._errand() for _ in range(1 + self.shape.defers)),
        )

    def _errand(self) -> Errand:
        tokens, hidden, dtype = self.shape.max_tokens, self.shape.hidden_size, self.shape.dtype
        return Errand(
            ids=self._pinned(tokens, self.shape.max_top_k, dtype=torch.int32),
            out=self._pinned(tokens, hidden, dtype=dtype),
            back=torch.zeros(tokens, hidden, dtype=dtype, device=self.device.where),
        )

    def _pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.device.pinned(*shape, dtype=dtype).zero_()


class Sent:
    """Tokens that one job was started for, until its results are back. `Owed`."""

    def __init__(
        self, handoff: Handoff, job: native.Job, errand: Errand, given: tuple[Tensor, ...]
    ) -> None:
        self._handoff, self._job = handoff, job
        self._given = given  # the side stream may still read it
        num_tokens = len(given[0])
        self._out, self.rows = errand.out[:num_tokens], errand.back[:num_tokens]

    def collect(self) -> None:
        stream = self._handoff.stream
        stream.finish(self._job)
        stream.run(partial(self.rows.copy_, self._out, non_blocking=True))
        self._handoff.device.main.wait(stream.record())


class HostSide:
    """The experts of one layer that live on the host, asked from the device."""

    def __init__(self, layer: native.ExpertLayer, handoff: Handoff, lane: Lane) -> None:
        self._layer, self._handoff, self._lane = layer, handoff, lane
        self.max_tokens = handoff.shape.max_tokens
        """Of one call."""
        self._shared = [
            self._new_job(place, self.max_tokens, count=lane.num_tokens)
            for place in range(len(lane.errands))
        ]
        self._kept: dict[tuple[int, int], native.Job] = {}  # by place and number of tokens

    def start(self, x: Tensor, weights: Tensor, *ids: Tensor) -> list[Sent]:
        """Hand over tokens, for each of `ids` as a job of its own, in their order.

        x [tokens, hidden]; weights and each of ids [tokens, top_k] on the device, -1 for who is not
        meant. All that is returned must be collected before the next start.
        """
        stream, num_tokens = self._handoff.stream, len(x)
        jobs = [self._job(place, num_tokens) for place in range(len(ids))]
        stream.wait(self._handoff.device.main.record())
        stream.run(partial(self._hand_over, x, weights, ids))
        for job in jobs:
            stream.start(job)
        errands = self._lane.errands
        given = (x, weights, *ids)
        return [Sent(self._handoff, *pair, given) for pair in zip(jobs, errands, strict=False)]

    def _hand_over(self, x: Tensor, weights: Tensor, ids: tuple[Tensor, ...]) -> None:
        lane, num_tokens = self._lane, len(x)
        lane.x[:num_tokens].copy_(x, non_blocking=True)
        lane.weights[:num_tokens].copy_(weights, non_blocking=True)
        for errand, rows in zip(lane.errands, ids, strict=False):
            errand.ids[:num_tokens].copy_(rows, non_blocking=True)
        if num_tokens > MOST_KEPT:
            count = self._handoff.counts[num_tokens : num_tokens + 1]
            lane.num_tokens.copy_(count, non_blocking=True)

    def _job(self, place: int, num_tokens: int) -> native.Job:
        if num_tokens > MOST_KEPT:
            return self._shared[place]
        key = place, num_tokens
        if key not in self._kept:
            self._kept[key] = self._new_job(place, num_tokens)
        return self._kept[key]

    def _new_job(self, place: int, num_tokens: int, count: Tensor | None = None) -> native.Job:
        lane, errand = self._lane, self._lane.errands[place]
        make = partial(
            self._layer.job,
            lane.x[:num_tokens],
            errand.ids[:num_tokens],
            lane.weights[:num_tokens],
            errand.out[:num_tokens],
            num_tokens=count,
        )
        return self._handoff.device.new_job(make)
