"""Latent attention of each query to the latents that were chosen for it.

DeepSeek-V3.2 (2025), section 2.1. They are read where they lie in the cache: copied side by side
first, as torch needs them, each would be written once and read twice more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kttrio.layers.paged import Latents
from kttrio.layers.triton.latents import add_latents, load_queries, plan_launch
from kttrio.layers.triton.softmax import begin, joined, leave, share_of


def sparse(query: Tensor, latents: Latents, rows: Tensor) -> Tensor:
    """As `Kernels.sparse`."""
    num_keys = rows.shape[1]
    launch = plan_launch(query, latents, num_keys)
    _sparse[launch.grid](
        query, latents.rows, rows, launch.out, *launch.partials,
        num_keys,
        launch.scale,
        **launch.constants,
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )  # fmt: skip
    return joined(launch.out, launch.partials)


@triton.jit
def _sparse(
    query, cache, rows, out, sums, scales, num_keys, scale,
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
    token, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = token * HEADS + head
    latent, rope = load_queries(query, row, head < HEADS, SIZE, ROPE, WIDTH, ROPE_WIDTH)
    latent, rope = latent.to(DOT), rope.to(DOT)
    first, last = share_of(split, num_keys, NUM_SPLITS, KEYS)
    maximum, total, summed = begin(ROWS, WIDTH)
    for block in range(first, last, KEYS):
        place = block + tl.arange(0, KEYS)
        chosen = tl.load(rows + token * num_keys + place, mask=place < last, other=-1)
        maximum, total, summed = add_latents(
            latent, rope, cache, chosen, chosen >= 0, scale,
            maximum, total, summed,
            SIZE, ROPE, WIDTH, ROPE_WIDTH, DOT,
        )  # fmt: skip
    state = (maximum, total, summed)
    leave(out, sums, scales, row, split, head < HEADS, state, SIZE, WIDTH, NUM_SPLITS)
