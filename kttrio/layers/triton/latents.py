"""What the kernels of latent attention share: queries and keys in two parts, values in one.

The latent part of a key is also its value, and read once for both. All heads read the same keys;
a program computes as many of them as a product wants rows.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kttrio.layers.paged import Latents
from kttrio.layers.triton.products import dot_dtype
from kttrio.layers.triton.softmax import LOG2_E, Partials, add_keys, num_splits
from kttrio.layers.triton.tiles import LEAST_ROWS, keys_per_block, padded


class Launch(NamedTuple):
    """What both kernels are started with."""

    grid: tuple[int, int, int]
    out: Tensor
    partials: Partials
    scale: float
    constants: dict[str, object]


def plan_launch(query: Tensor, latents: Latents, num_keys: int) -> Launch:
    """For query [n, heads, size + rope] that see `num_keys` at most."""
    n, heads, kept = query.shape
    num_blocks = triton.cdiv(heads, LEAST_ROWS)
    splits = num_splits(num_keys, n * num_blocks, query.device)
    out = query.new_empty(n, heads, latents.size)
    constants = {
        "HEADS": heads,
        "SIZE": latents.size,
        "ROPE": kept - latents.size,
        "NUM_SPLITS": splits,
        "ROWS": LEAST_ROWS,
        "WIDTH": padded(latents.size),
        "ROPE_WIDTH": padded(kept - latents.size),
        # What is key and value in one leaves room for twice as many.
        "KEYS": keys_per_block(padded(latents.size) // 2, query.dtype),
        "DOT": dot_dtype(query),
    }
    grid = (n, num_blocks, splits)
    return Launch(grid, out, Partials.like(out, splits), latents.scale * LOG2_E, constants)


@triton.jit
def load_queries(
    query, row, kept,
    SIZE: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr, ROPE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Both parts of the rows that are `kept`: [rows, WIDTH] and [rows, ROPE_WIDTH]"""
    column, turned = tl.arange(0, WIDTH), tl.arange(0, ROPE_WIDTH)
    at = query + row[:, None] * (SIZE + ROPE)
    inside = kept[:, None] & (column < SIZE)[None, :]
    latent = tl.load(at + column[None, :], mask=inside, other=0.0)
    inside = kept[:, None] & (turned < ROPE)[None, :]
    return latent, tl.load(at + SIZE + turned[None, :], mask=inside, other=0.0)


@triton.jit
def add_latents(
    latent, rope, cache, row, seen, scale, maximum, total, summed,
    SIZE: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr, ROPE_WIDTH: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Take in the rows [keys] of the cache that are `seen`; queries are in DOT already."""
    column, turned = tl.arange(0, WIDTH), tl.arange(0, ROPE_WIDTH)
    at = cache + row * (SIZE + ROPE)
    inside = seen[:, None] & (column < SIZE)[None, :]
    values = tl.load(at[:, None] + column[None, :], mask=inside, other=0.0).to(DOT)
    inside = (turned < ROPE)[:, None] & seen[None, :]
    keys = tl.load(at[None, :] + SIZE + turned[:, None], mask=inside, other=0.0).to(DOT)
    scores = tl.dot(rope, keys, input_precision="ieee")
    scores = tl.dot(latent, tl.trans(values), scores, input_precision="ieee") * scale
    return add_keys(scores, seen[None, :], values, maximum, total, summed, DOT)
