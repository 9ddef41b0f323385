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

    def __init__(self, handoff: Handoff, way: Way, given: tuple[Tensor, ...]) -> None:
        self._handoff, self._way = handoff, way
        self._given = given  # the side stream may still read it
        self.rows = way.back

    def collect(self) -> None:
        stream, way = self._handoff.stream, self._way
        stream.finish(way.job)
        stream.run(partial(way.back.copy_, way.out, non_blocking=True))
        self._handoff.device.main.wait(stream.record())


class Way(NamedTuple):
    """An errand for a number of tokens, and its job."""

    job: native.Job
    ids: Tensor
    out: Tensor
    back: Tensor


class Ways(NamedTuple):
    """A lane for a number of tokens."""

    x: Tensor
    weights: Tensor
    ways: tuple[Way, ...]


class HostSide:
    """The experts of one layer that live on the host, asked from the device."""

    def __init__(self, layer: native.ExpertLayer, handoff: Handoff, lane: Lane) -> None:
        self._layer, self._handoff, self._lane = layer, handoff, lane
        most = handoff.shape.max_tokens
        self._shared = tuple(
            self._new_job(errand, most, num_tokens=lane.num_tokens) for errand in lane.errands
        )
        self._kept: dict[int, Ways] = {}  # by number of tokens

    def start(self, x: Tensor, weights: Tensor, *ids: Tensor) -> list[Sent]:
        """Hand over tokens, for each of `ids` as a job of its own, in their order.

        x [tokens, hidden]; weights and each of ids [tokens, top_k] on the device, -1 for who is not
        meant. All that is returned must be collected before the next start.
        """
        handoff, given = self._handoff, (x, weights, *ids)
        stream, ways = handoff.stream, self._ways(len(x))
        stream.wait(handoff.device.main.record())
        stream.run(partial(self._hand_over, ways, given))
        sent = []
        for way, _ in zip(ways.ways, ids, strict=False):
            stream.start(way.job)
            sent.append(Sent(handoff, way, given))
        return sent

    def _hand_over(self, ways: Ways, given: tuple[Tensor, ...]) -> None:
        x, weights, *ids = given
        ways.x.copy_(x, non_blocking=True)
        ways.weights.copy_(weights, non_blocking=True)
        for way, rows in zip(ways.ways, ids, strict=False):
            way.ids.copy_(rows, non_blocking=True)
        num_tokens = x.shape[0]
        if num_tokens > MOST_KEPT:
            count = self._handoff.counts[num_tokens : num_tokens + 1]
            self._lane.num_tokens.copy_(count, non_blocking=True)

    def _ways(self, num_tokens: int) -> Ways:
        if num_tokens > MOST_KEPT:
            return self._new_ways(num_tokens, self._shared)
        if num_tokens not in self._kept:
            jobs = (self._new_job(errand, num_tokens) for errand in self._lane.errands)
            self._kept[num_tokens] = self._new_ways(num_tokens, tuple(jobs))
        return self._kept[num_tokens]

    def _new_ways(self, num_tokens: int, jobs: tuple[native.Job, ...]) -> Ways:
        first = slice(num_tokens)
        ways = (
            Way(job, *(tensor[first] for tensor in errand))
            for job, errand in zip(jobs, self._lane.errands, strict=True)
        )
        return Ways(self._lane.x[first], self._lane.weights[first], tuple(ways))

    def _new_job(
        self, errand: Errand, num_rows: int, num_tokens: Tensor | None = None
    ) -> native.Job:
        make = partial(
            self._layer.job,
            self._lane.x[:num_rows],
            errand.ids[:num_rows],
            self._lane.weights[:num_rows],
            errand.out[:num_rows],
            num_tokens=num_tokens,
        )
        return self._handoff.device.new_job(make)
