"""What kernels of attention share: the running softmax, and work that is split over keys.

Few queries leave most of a device idle unless several programs share the keys of one. Each then
leaves a partial sum behind, and `joined` adds them up. Scores are logarithms to the base of two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = tl.constexpr(-1.0e30)  # below every score, yet two of it have a difference
LOG2_E = math.log2(math.e)
_PARTS = tl.constexpr(16)  # that are added up at once
KEYS_PER_SPLIT = 256  # fewer are not worth a program of their own
_WAVES = 2  # of programs, for each processor of the device
_INTERPRETED = 4  # processors, as the interpreter has none


class Partials(NamedTuple):
    """What the programs of a query leave behind, one for each split of its keys; float32."""

    sums: Tensor  # [n, heads, splits, size] of weighted values
    scales: Tensor  # [n, heads, splits, 2] their maximum score, and the sum of weights

    @classmethod
    def like(cls, out: Tensor, num_splits: int) -> Partials:
        """For out [n, heads, size]; empty where nothing is split."""
        shape = (*out.shape[:2], num_splits if num_splits > 1 else 0)
        new = out.new_empty
        return cls(
            new((*shape, out.shape[2]), dtype=torch.float32), new((*shape, 2), dtype=torch.float32)
        )


def num_splits(num_keys: int, num_programs: int, device: torch.device) -> int:
    """Among how many programs to share the keys of one, where there are `num_programs` to share
    and `num_keys` at most: only from shapes, for a captured step keeps it. A power of two, so that
    few kernels are compiled for all sizes of a batch."""
    processors = _INTERPRETED
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = _WAVES * processors // num_programs
    useful = max(min(wanted, -(-num_keys // KEYS_PER_SPLIT)), 1)
    return int(triton.next_power_of_2(useful + 1) // 2)


@triton.jit
def share_of(split, num_keys, NUM_SPLITS: tl.constexpr, KEYS: tl.constexpr):
    """The keys [first, last) of a split, whole blocks of KEYS; none where they do not suffice."""
    share = tl.cdiv(tl.cdiv(num_keys, NUM_SPLITS), KEYS) * KEYS
    first = split * share
    return first, tl.minimum(first + share, num_keys)


@triton.jit
def begin(ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Maximum, sum of weights, and sum of weighted values of rows that have seen nothing."""
    return (
        tl.full([ROWS], LEAST, tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, SIZE], tl.float32),
    )


@triton.jit
def add_keys(scores, seen, values, maximum, total, summed, DOT: tl.constexpr):
    """Take in scores [rows, keys] where `seen` says so, and values [keys, size]; those of keys
    that no row sees must be finite."""
    scores = tl.where(seen, scores, LEAST)
    newest = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.where(seen, tl.exp2(scores - newest[:, None]), 0.0)
    faded = tl.exp2(maximum - newest)
    summed = tl.dot(weights.to(DOT), values, summed * faded[:, None], input_precision="ieee")
    return newest, total * faded + tl.sum(weights, 1), summed


@triton.jit
def leave(
    out, sums, scales, row, split, kept, state,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """Write what rows have seen: the result itself, or the part of a split. `row` [rows] counts
    queries and heads, `kept` says which of them there are."""
    maximum, total, summed = state
    column = tl.arange(0, WIDTH)
    inside = kept[:, None] & (column < SIZE)[None, :]
    if NUM_SPLITS == 1:
        # Rows that are not there have seen nothing.
        result = (summed / tl.where(kept, total, 1.0)[:, None]).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * SIZE + column[None, :], result, mask=inside)
    else:
        part = row * NUM_SPLITS + split
        tl.store(sums + part[:, None] * SIZE + column[None, :], summed, mask=inside)
        tl.store(scales + part * 2, maximum, mask=kept)
        tl.store(scales + part * 2 + 1, total, mask=kept)


@triton.jit
def _join(
    out, sums, scales,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    every, column = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    highest = tl.load(scales + (row * NUM_SPLITS + every) * 2, mask=every < NUM_SPLITS, other=LEAST)
    highest = tl.max(highest, 0)
    total, summed = tl.zeros([_PARTS], tl.float32), tl.zeros([_PARTS, WIDTH], tl.float32)
    for first in range(0, NUM_SPLITS, _PARTS):
        split = first + tl.arange(0, _PARTS)
        there, part = split < NUM_SPLITS, row * NUM_SPLITS + split
        weight = tl.exp2(tl.load(scales + part * 2, mask=there, other=LEAST) - highest)
        total += weight * tl.load(scales + part * 2 + 1, mask=there, other=0.0)
        inside = there[:, None] & (column < SIZE)[None, :]
        parts = tl.load(sums + part[:, None] * SIZE + column[None, :], mask=inside, other=0.0)
        summed += weight[:, None] * parts
    result = tl.sum(summed, 0) / tl.sum(total, 0)
    tl.store(out + row * SIZE + column, result.to(out.dtype.element_ty), mask=column < SIZE)


def joined(out: Tensor, partials: Partials) -> Tensor:
    """`out` [n, heads, size], filled from its parts where it was split."""
    splits, size = partials.sums.shape[2:]
    if splits:
        _join[(out.shape[0] * out.shape[1],)](
            out, *partials,
            SIZE=size,
            WIDTH=triton.next_power_of_2(size),
            NUM_SPLITS=splits,
            SPLITS=triton.next_power_of_2(splits),
            enable_fp_fusion=True,
        )  # fmt: skip
    return out
