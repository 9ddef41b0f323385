"""Brings stored matrices into another format, many at a time, and measures what that costs.

A matrix is taken a slab of rows at a time, so that a thread needs little memory beside its result.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.formats import base as formats
from kttrio.weights.formats.base import Packed
from kttrio.weights.formats.fp8 import BLOCK
from kttrio.weights.loader import Part

_SLAB_WEIGHTS = 2**18  # fits a core's second-level cache and still makes Python's share small
_AHEAD = 2  # matrices that may be finished or under way for each thread


class Target(NamedTuple):
    """A format, and how many weights along a row share a scale in it."""

    form: str
    group: int


class Deviation(NamedTuple):
    """How far quantised weights are from what they were made from."""

    square_error: float = 0.0
    square_weight: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square of the error, over that of the weights."""
        return math.sqrt(self.square_error / self.square_weight) if self.square_weight else 0.0

    def plus(self, other: Deviation) -> Deviation:
        return Deviation(
            self.square_error + other.square_error, self.square_weight + other.square_weight
        )


class Quantised(NamedTuple):
    """A matrix in its new format."""

    part: Part
    packed: Packed
    deviation: Deviation


def quantise_all(
    checkpoint: Checkpoint, parts: Iterable[Part], target: Target, *, threads: int
) -> Iterator[Quantised]:
    """Every matrix in turn, while the threads are ahead with the next ones.

    Matrices that are in the target's format already come as they are stored. Meanwhile torch uses
    one thread for each operation in this process. CheckpointError names a matrix that is not
    finite.
    """
    pending: deque[Future[Quantised]] = deque()
    with _workers(threads) as pool:
        for part in parts:
            pending.append(pool.submit(quantise, checkpoint, part, target))
            if len(pending) > _AHEAD * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def _workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="quantise")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


@torch.inference_mode()
def quantise(checkpoint: Checkpoint, part: Part, target: Target) -> Quantised:
    """One matrix; see `quantise_all`."""
    stored = formats.stored_format(checkpoint, part.name)
    source, form = formats.find(stored), formats.find(target.form)
    packed = source.load(checkpoint, part.name)
    if stored == target.form:
        return Quantised(part, packed, Deviation())
    done: list[Packed] = []
    deviation = Deviation()
    for slab in _slabs(packed, part.shape):
        weight = source.dequantize(slab, torch.float32)
        result = form.quantize(weight, target.group)
        error = form.dequantize(result, torch.float32).sub_(weight)
        deviation = deviation.plus(Deviation(_square_sum(error), _square_sum(weight)))
        done.append(result)
    if not math.isfinite(deviation.square_weight):
        file = checkpoint.entry(part.name).file
        raise CheckpointError(f"tensor {part.name!r} in {file} has weights that are not finite")
    return Quantised(part, _joined(done), deviation)


def _slabs(packed: Packed, shape: tuple[int, ...]) -> Iterator[Packed]:
    """Rows together, as many as keep whole squares of scales and make a piece of work."""
    rows, columns = shape
    step = max(_SLAB_WEIGHTS // columns // BLOCK, 1) * BLOCK
    for begin in range(0, rows, step):
        end = begin + step
        scale = packed.scale
        if scale is not None:
            scale = scale[begin // BLOCK : -(-end // BLOCK)]
        yield Packed(packed.data[begin:end], scale)


def _square_sum(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


def _joined(slabs: list[Packed]) -> Packed:
    scales = [slab.scale for slab in slabs if slab.scale is not None]
    data = torch.cat([slab.data for slab in slabs])
    return Packed(data, torch.cat(scales) if scales else None)
