"""Grouped-query attention of single queries over paged keys, split over the keys.

A program computes all heads that share a KV head, for a part of one sequence's keys: what it reads
it reads once. Dao et al., "Flash-Decoding" (2023).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kttrio.layers.cache import AttentionCache
from kttrio.layers.paged import Tables
from kttrio.layers.triton.products import dot_dtype
from kttrio.layers.triton.softmax import (
    LOG2_E,
    Partials,
    add_keys,
    begin,
    joined,
    leave,
    num_splits,
    share_of,
)
from kttrio.layers.triton.tiles import keys_per_block, padded


def decode(query: Tensor, cache: AttentionCache, tables: Tables) -> Tensor:
    """As `Kernels.decode`."""
    n, heads, head_dim = query.shape
    kv_heads = cache.key.shape[2]
    pages, positions, page_size = tables
    splits = num_splits(pages.shape[1] * page_size, n * kv_heads, query.device)
    width, out = padded(head_dim), query.new_empty(query.shape)
    partials = Partials.like(out, splits)
    _decode[(n, kv_heads, splits)](
        query, cache.key, cache.value, pages, positions, out, *partials,
        pages.stride(0),
        head_dim**-0.5 * LOG2_E,
        PAGE_SIZE=page_size,
        KV_HEADS=kv_heads,
        SHARED=heads // kv_heads,
        HEAD_DIM=head_dim,
        NUM_SPLITS=splits,
        ROWS=padded(heads // kv_heads),
        WIDTH=width,
        KEYS=keys_per_block(width, query.dtype),
        DOT=dot_dtype(query),
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )  # fmt: skip
    return joined(out, partials)


@triton.jit
def _decode(
    query, key, value, pages, positions, out, sums, scales, table_width, scale,
    PAGE_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    num_keys = (tl.load(positions + sequence) + 1).to(tl.int32)
    first, last = share_of(split, num_keys, NUM_SPLITS, KEYS)
    head, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    row = (sequence * KV_HEADS + kv_head) * SHARED + head
    inside = column < HEAD_DIM
    mine = tl.load(
        query + row[:, None] * HEAD_DIM + column[None, :],
        mask=(head < SHARED)[:, None] & inside[None, :],
        other=0.0,
    ).to(DOT)
    maximum, total, summed = begin(ROWS, WIDTH)
    for block in range(first, last, KEYS):
        place = block + tl.arange(0, KEYS)
        seen = place < last
        page = tl.load(pages + sequence * table_width + place // PAGE_SIZE, mask=seen, other=0)
        at = ((page * PAGE_SIZE + place % PAGE_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
        keys = tl.load(
            key + at[None, :] + column[:, None], mask=seen[None, :] & inside[:, None], other=0.0
        ).to(DOT)
        values = tl.load(
            value + at[:, None] + column[None, :], mask=seen[:, None] & inside[None, :], other=0.0
        ).to(DOT)
        scores = tl.dot(mine, keys, input_precision="ieee") * scale
        maximum, total, summed = add_keys(
            scores, seen[None, :], values, maximum, total, summed, DOT
        )
    state = (maximum, total, summed)
    leave(out, sums, scales, row, split, head < SHARED, state, HEAD_DIM, WIDTH, NUM_SPLITS)
