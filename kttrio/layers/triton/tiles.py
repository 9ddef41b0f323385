"""How much a program of attention computes at once.

Nothing is tuned: sizes are what fits everywhere. A block of keys and one of values lie twice in
shared memory, one being read while the other is used; consumer chips have 99 KiB of it.
"""

from __future__ import annotations

import torch
import triton

LEAST_ROWS = 16  # of a product, and the least depth
_BLOCK_BYTES = 16 << 10  # of keys, and as many of values
_QUERY_BYTES = 32 << 10


def padded(rows: int) -> int:
    """A size that programs can work with."""
    return int(max(triton.next_power_of_2(rows), LEAST_ROWS))


def keys_per_block(width: int, dtype: torch.dtype) -> int:
    """Keys of `width` numbers; with a head of 128 in bfloat16, 64."""
    return min(max(_BLOCK_BYTES // (width * dtype.itemsize), LEAST_ROWS), 64)


def query_rows(width: int, dtype: torch.dtype, *, least: int) -> int:
    """Queries times heads, where there are many."""
    return max(min(_QUERY_BYTES // (width * dtype.itemsize), 64), padded(least))
