"""Causal grouped-query attention of chunks of sequences over paged keys, their own among them.

A program computes a few consecutive queries with all heads that share a KV head: as many rows for
a chunk of three drafts as for a long prompt. Dao, "FlashAttention-2" (2023).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kttrio.layers.cache import AttentionCache
from kttrio.layers.paged import Chunks
from kttrio.layers.triton.products import dot_dtype
from kttrio.layers.triton.softmax import LOG2_E, add_keys, begin, leave
from kttrio.layers.triton.tiles import keys_per_block, padded, query_rows


def prefill(query: Tensor, cache: AttentionCache, chunks: Chunks) -> Tensor:
    """As `Kernels.prefill`."""
    _, heads, head_dim = query.shape
    kv_heads = cache.key.shape[2]
    spaced = triton.next_power_of_2(heads // kv_heads)
    width, out = padded(head_dim), query.new_empty(query.shape)
    rows = query_rows(width, query.dtype, least=spaced)
    num_blocks = triton.cdiv(chunks.longest, rows // spaced)
    _prefill[(num_blocks, kv_heads, len(chunks.starts))](
        query, cache.key, cache.value, chunks.pages, chunks.starts, chunks.offsets, out,
        chunks.pages.stride(0),
        head_dim**-0.5 * LOG2_E,
        PAGE_SIZE=chunks.page_size,
        KV_HEADS=kv_heads,
        SHARED=heads // kv_heads,
        SPACED=spaced,
        HEAD_DIM=head_dim,
        ROWS=rows,
        WIDTH=width,
        KEYS=keys_per_block(width, query.dtype),
        DOT=dot_dtype(query),
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit
def _prefill(
    query, key, value, pages, starts, offsets, out, table_width, scale,
    PAGE_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    SPACED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    block, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    offset = tl.load(offsets + sequence)
    length = (tl.load(offsets + sequence + 1) - offset).to(tl.int32)
    start = tl.load(starts + sequence).to(tl.int32)
    first = block * (ROWS // SPACED)
    index, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    token, head = first + index // SPACED, index % SPACED
    asking = (token < length) & (head < SHARED)
    row = ((offset + token) * KV_HEADS + kv_head) * SHARED + head
    inside = column < HEAD_DIM
    mine = tl.load(
        query + row[:, None] * HEAD_DIM + column[None, :],
        mask=asking[:, None] & inside[None, :],
        other=0.0,
    ).to(DOT)
    # A shorter sequence has no such block: nothing to see, nothing to write.
    num_keys = tl.where(first < length, start + tl.minimum(first + ROWS // SPACED, length), 0)
    maximum, total, summed = begin(ROWS, WIDTH)
    for begun in range(0, num_keys, KEYS):
        place = begun + tl.arange(0, KEYS)
        there = place < num_keys
        page = tl.load(pages + sequence * table_width + place // PAGE_SIZE, mask=there, other=0)
        at = ((page * PAGE_SIZE + place % PAGE_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
        keys = tl.load(
            key + at[None, :] + column[:, None], mask=there[None, :] & inside[:, None], other=0.0
        ).to(DOT)
        values = tl.load(
            value + at[:, None] + column[None, :], mask=there[:, None] & inside[None, :], other=0.0
        ).to(DOT)
        scores = tl.dot(mine, keys, input_precision="ieee") * scale
        seen = there[None, :] & (place[None, :] <= (start + token)[:, None])
        maximum, total, summed = add_keys(scores, seen, values, maximum, total, summed, DOT)
    leave(out, out, out, row, 0, asking, (maximum, total, summed), HEAD_DIM, WIDTH, 1)
