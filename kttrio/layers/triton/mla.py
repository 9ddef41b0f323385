"""Latent attention of single queries, carried over to the latents, over pages of them.

DeepSeek-V2 (2024), section 2.1; what else it takes is in `layers/latent.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kttrio.layers.paged import Latents, Tables
from kttrio.layers.triton.latents import add_latents, load_queries, plan_launch
from kttrio.layers.triton.softmax import begin, joined, leave, share_of


def latent(query: Tensor, latents: Latents, tables: Tables) -> Tensor:
    """As `Kernels.latent`."""
    pages, positions, page_size = tables
    launch = plan_launch(query, latents, pages.shape[1] * page_size)
    _latent[launch.grid](
        query, latents.rows, pages, positions, launch.out, *launch.partials,
        pages.stride(0),
        launch.scale,
        PAGE_SIZE=page_size,
        **launch.constants,
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )  # fmt: skip
    return joined(launch.out, launch.partials)


@triton.jit
def _latent(
    query, cache, pages, positions, out, sums, scales, table_width, scale,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    ROPE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    sequence, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = sequence * HEADS + head
    latent, rope = load_queries(query, row, head < HEADS, SIZE, ROPE, WIDTH, ROPE_WIDTH)
    latent, rope = latent.to(DOT), rope.to(DOT)
    num_keys = (tl.load(positions + sequence) + 1).to(tl.int32)
    first, last = share_of(split, num_keys, NUM_SPLITS, KEYS)
    maximum, total, summed = begin(ROWS, WIDTH)
    for block in range(first, last, KEYS):
        place = block + tl.arange(0, KEYS)
        seen = place < last
        page = tl.load(pages + sequence * table_width + place // PAGE_SIZE, mask=seen, other=0)
        maximum, total, summed = add_latents(
            latent, rope, cache, page * PAGE_SIZE + place % PAGE_SIZE, seen, scale,
            maximum, total, summed,
            SIZE, ROPE, WIDTH, ROPE_WIDTH, DOT,
        )  # fmt: skip
    state = (maximum, total, summed)
    leave(out, sums, scales, row, split, head < HEADS, state, SIZE, WIDTH, NUM_SPLITS)
