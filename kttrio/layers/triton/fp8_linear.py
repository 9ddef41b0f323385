"""The product with a matrix in FP8: what `layers/fp8_linear.py` says.

Weights are widened in registers. For W8A8 activations are rounded there too: a step along the depth
is one group of 128 columns, so their scale is at hand, and nothing is written in between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kttrio.layers.triton.products import (
    add_step,
    dot_dtype,
    load_tile,
    load_weights,
    pointers,
    values,
)
from kttrio.weights.formats import fp8
from kttrio.weights.formats.base import Packed

_BLOCK = tl.constexpr(fp8.BLOCK)
_LARGEST = tl.constexpr(fp8.LARGEST)


class Tiles(NamedTuple):
    """What a program computes at once."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def fp8_linear(x: Tensor, packed: Packed, *, scheme: str) -> Tensor:
    """As `layers.fp8_linear.fp8_linear`; the matrix contiguous."""
    x, width = x.contiguous(), packed.data.shape[0]
    out = x.new_empty(len(x), width)
    if not len(x):
        return out
    tiles = _tiles(x)
    grid = (triton.cdiv(len(x), tiles.rows) * triton.cdiv(width, tiles.columns),)
    _linear[grid](
        *(x, out, *pointers("fp8", packed), len(x), x.shape[1], width),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        ROUNDED=scheme == "w8a8",
        DOT=dot_dtype(x),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    return out


def _tiles(x: Tensor) -> Tiles:
    """Few tokens: many small programs, for memory is the limit."""
    if x.dtype is torch.float32:
        return Tiles(rows=16, columns=32, num_warps=4, num_stages=1)
    if len(x) <= 16:
        return Tiles(rows=16, columns=32, num_warps=4, num_stages=4)
    if len(x) <= 256:
        return Tiles(rows=32, columns=64, num_warps=4, num_stages=3)
    return Tiles(rows=128, columns=64, num_warps=8, num_stages=2)


@triton.jit
def _rounded(x):
    """float32 to the nearest number of e4m3, still as float32: three bits of fraction, and below
    2^-6 multiples of 2^-9."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    small = (x + 24576.0) - 24576.0  # where float32 itself has steps of 2^-9
    return tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))


@triton.jit
def _add_rounded(total, tile, codes, scale, DOT: tl.constexpr):
    """total + tile @ weights with the tile's rows rounded to e4m3."""
    wide = tile.to(tl.float32)
    unit = tl.maximum(tl.max(tl.abs(wide), axis=1), 1e-12) / _LARGEST
    scaled = wide / unit[:, None]
    if DOT is tl.float32:
        part = tl.dot(_rounded(scaled), values(codes, "fp8", DOT) * 256, input_precision="ieee")
    else:
        part = tl.dot(scaled.to(tl.float8e4nv), codes.to(tl.float8e4nv, bitcast=True))
    return total + part * unit[:, None] * scale[None, :]


@triton.jit
def _linear(
    x,
    out,
    data,
    scale,
    num_rows,
    depth,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROUNDED: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile. Programs that share weights come one after the other: these are the larger part."""
    num_blocks = tl.cdiv(num_rows, ROWS)
    rows = tl.program_id(0) % num_blocks * ROWS + tl.arange(0, ROWS)
    kept = rows < num_rows
    x_rows = x + rows.to(tl.int64) * depth
    n = tl.program_id(0) // num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    n_kept = n < width
    w_rows = data + n.to(tl.int64) * depth
    s_rows = scale + n // _BLOCK * tl.cdiv(depth, _BLOCK)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(tl.cdiv(depth, _BLOCK)):
        tile = load_tile(x_rows, kept, step * _BLOCK, depth, _BLOCK)
        codes = load_weights(w_rows, n_kept, step * _BLOCK, depth, _BLOCK)
        scales = tl.load(s_rows + step, mask=n_kept, other=0)
        if ROUNDED:
            total = _add_rounded(total, tile, codes, scales, DOT)
        else:
            tile = tile.to(DOT)
            total = add_step(total, tile, tile, codes, scales, "fp8", DOT)
    places = out + rows.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=kept[:, None] & n_kept[None, :])
