"""Pieces of matrix products with stored weights: dequantised in registers, scaled after the dot.

Codes of every format are exact in bfloat16, so a product is as good as one with the weights in
float32: the scale of a group multiplies that group's float32 sum. That asks for steps along the
depth that lie within one group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kttrio.weights import groups
from kttrio.weights.formats import fp8, int4, int8
from kttrio.weights.formats.base import Packed

_PLAIN_DEPTH = 64  # of a step where nothing is scaled


class Coding(NamedTuple):
    """What a kernel must know of a format; constants of its compilation."""

    form: str
    group: int
    """Weights along a row with a common scale; without scales the depth of a step."""
    scale_rows: int
    """Rows with a common scale."""
    per_byte: int

    @classmethod
    def of(cls, form: str, packed: Packed) -> Coding:
        """`packed` may have dimensions before those of the matrix."""
        if packed.scale is None:
            return cls(form, _PLAIN_DEPTH, 1, 1)
        if form == "fp8":
            return cls(form, fp8.BLOCK, fp8.BLOCK, 1)
        per_byte = int4.PER_BYTE if form == "int4" else int8.PER_BYTE
        columns = packed.data.shape[-1] * per_byte
        return cls(form, groups.size(columns, packed.scale.shape[-1]), 1, per_byte)

    def constants(self) -> dict[str, object]:
        return {name.upper(): value for name, value in self._asdict().items()}


def pointers(form: str, packed: Packed) -> tuple[Tensor, Tensor]:
    """Data and scales as kernels take them: fp8 as bytes, for every chip reads these; the data
    once more where there are no scales."""
    data = packed.data.view(torch.uint8) if form == "fp8" else packed.data
    return data, data if packed.scale is None else packed.scale


def side_by_side(x: Tensor) -> Tensor:
    """Even columns, then odd ones: those that meet the low bits of int4, and the high ones."""
    return x.view(len(x), -1, 2).transpose(1, 2).reshape(x.shape)


def dot_dtype(x: Tensor) -> tl.dtype:
    """What to multiply in. Triton's interpreter, which runs kernels on CPU tensors, has no dot of
    bfloat16."""
    if x.device.type == "cpu" or x.dtype is torch.float32:
        return tl.float32
    return tl.bfloat16


@triton.jit
def load_tile(rows, kept, column, num_columns, SIZE: tl.constexpr):
    """[rows, SIZE] from pointers to row starts; zero outside `kept` rows and the columns."""
    columns = column + tl.arange(0, SIZE)
    inside = kept[:, None] & (columns < num_columns)[None, :]
    return tl.load(rows[:, None] + columns[None, :], mask=inside, other=0)


@triton.jit
def load_weights(rows, kept, column, num_columns, SIZE: tl.constexpr):
    """The same, transposed: [SIZE, rows]"""
    columns = column + tl.arange(0, SIZE)
    inside = kept[None, :] & (columns < num_columns)[:, None]
    return tl.load(rows[None, :] + columns[:, None], mask=inside, other=0)


@triton.jit
def load_scales(places, kept, FORM: tl.constexpr):
    """float32 [rows]; what is given in the place of scales that a format does not have, is not
    read."""
    if FORM == "bf16":
        return tl.full(kept.shape, 1.0, tl.float32)
    return tl.load(places, mask=kept, other=0).to(tl.float32)


@triton.jit
def values(codes, FORM: tl.constexpr, DOT: tl.constexpr):
    """Codes as numbers; those of fp8 256 times too small.

    The seven bits of an e4m3 magnitude, put where float16 keeps the end of its exponent and the
    begin of its fraction, are the same number but for the biases, 7 and 15; subnormals included.
    """
    if FORM == "fp8":
        bits = codes.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return bits.to(tl.float16, bitcast=True).to(tl.float32).to(DOT)
    return codes.to(tl.float32).to(DOT)


@triton.jit
def add_step(total, low, high, codes, scale, FORM: tl.constexpr, DOT: tl.constexpr):
    """total [m, n] + x @ weights for one step along the depth.

    x is `low` [m, k]; for int4 that is what meets the low bits, and `high` what meets the high
    ones. codes [k, n], scale [n] float32.
    """
    if FORM == "bf16":
        return tl.dot(low, codes.to(DOT), total, input_precision="ieee")
    if FORM == "int4":
        part = tl.dot(low, ((codes & 15).to(tl.float32) - 8).to(DOT), input_precision="ieee")
        upper = ((codes >> 4).to(tl.float32) - 8).to(DOT)
        part = tl.dot(high, upper, part, input_precision="ieee")
        return total + part * scale[None, :]
    part = tl.dot(low, values(codes, FORM, DOT), input_precision="ieee")
    if FORM == "fp8":
        scale *= 256
    return total + part * scale[None, :]
