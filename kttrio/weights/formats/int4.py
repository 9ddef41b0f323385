"""Symmetric 4-bit weights with one scale per group of a row: weight = (code - 8) * scale.

Stored as `NAME` uint8 [out, in / 2], two codes to a byte, the even column in the low bits, and
`NAME_scale` bfloat16 [out, groups]. A scale may be negative: the side of the range that reaches
further, -8, then stands for positive weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kttrio.weights import groups
from kttrio.weights.checkpoint import Checkpoint
from kttrio.weights.formats.base import Packed

COMPANION = groups.COMPANION
PER_BYTE = 2
GROUPS = (64, 32, 128)
LOWEST, HIGHEST = -8.0, 7.0

# Where the group's extreme weight may come to lie, in codes. Beyond -8 it is clipped, which pays
# when the others gain more by the finer steps. Four places and a refit leave 0.6 % more error than
# twenty do, at a fifth of the time; -8 alone leaves 5 % more.
EXTREMES = (-7.3, -8.1, -8.9, -9.8)


def claims(checkpoint: Checkpoint, name: str) -> bool:
    return name + COMPANION in checkpoint and checkpoint.entry(name).dtype is torch.uint8


def stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], -(-shape[-1] // PER_BYTE))


def nbytes(shape: tuple[int, ...], group: int) -> int:
    return torch.Size(stored_shape(shape)).numel() + groups.scale_bytes(shape, group)


def empty(shape: tuple[int, ...], group: int, device: torch.device) -> Packed:
    data = torch.empty(stored_shape(shape), dtype=torch.uint8, device=device)
    return Packed(data, groups.empty(shape, group, device))


def check(checkpoint: Checkpoint, name: str) -> None:
    groups.check(checkpoint, name, per_byte=PER_BYTE)


def group_sizes(checkpoint: Checkpoint, name: str) -> frozenset[int]:
    return groups.sizes(checkpoint, name, per_byte=PER_BYTE)


def load(checkpoint: Checkpoint, name: str) -> Packed:
    return groups.load(checkpoint, name)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    pairs = torch.stack((packed.data & 15, packed.data >> 4), dim=-1)
    return groups.multiply(pairs.flatten(1).to(torch.int8) - 8, packed.scale).to(dtype)


def quantize(weight: Tensor, group: int) -> Packed:
    """The scale with the least squared error of those tried; columns must be even in number."""
    folded = groups.fold(weight, group)
    scale = _refit(folded, _best_scale(folded))
    codes = _codes(folded, scale).add_(8).to(torch.uint8)
    rows, columns = weight.shape
    pairs = groups.unfold(codes, columns).reshape(rows, columns // 2, 2)
    return Packed(pairs[..., 0] | pairs[..., 1] << 4, scale.squeeze(-1).to(torch.bfloat16))


def _best_scale(folded: Tensor) -> Tensor:
    """[rows, groups, group] -> [rows, groups, 1]"""
    low, high = folded.amin(-1, keepdim=True), folded.amax(-1, keepdim=True)
    extreme = torch.where(-low > high, low, high)
    first, *others = EXTREMES
    best = groups.storable(extreme / first)
    least = _error(folded, best)
    for place in others:
        scale = groups.storable(extreme / place)
        error = _error(folded, scale)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best)
    return best


def _refit(folded: Tensor, scale: Tensor) -> Tensor:
    """The scale of least squared error for the codes that `scale` gives."""
    codes = _codes(folded, scale)
    product = torch.linalg.vecdot(folded, codes)
    square = torch.linalg.vecdot(codes, codes).clamp_(min=1.0)
    return groups.storable((product / square).unsqueeze(-1))


def _codes(folded: Tensor, scale: Tensor) -> Tensor:
    return (folded / scale).round_().clamp_(LOWEST, HIGHEST)


def _error(folded: Tensor, scale: Tensor) -> Tensor:
    """Root of the sum of squares of each group: [rows, groups, 1]"""
    exact = folded / scale
    rest = exact.sub_(exact.round().clamp_(LOWEST, HIGHEST))
    norm: Tensor = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
    return norm.mul_(scale.abs())
