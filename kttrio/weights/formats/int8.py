"""Symmetric 8-bit weights with one scale per group of a row: weight = data * scale.

Stored as `NAME` int8 [out, in], codes -127..127, and `NAME_scale` bfloat16 [out, groups].
"""

from __future__ import annotations

import torch
from torch import Tensor

from kttrio.weights import groups
from kttrio.weights.checkpoint import Checkpoint
from kttrio.weights.formats.base import Packed

COMPANION = groups.COMPANION
PER_BYTE = 1
GROUPS = (128, 64, 32)
LARGEST = 127.0


def claims(checkpoint: Checkpoint, name: str) -> bool:
    return name + COMPANION in checkpoint and checkpoint.entry(name).dtype is torch.int8


def stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def nbytes(shape: tuple[int, ...], group: int) -> int:
    return torch.Size(shape).numel() + groups.scale_bytes(shape, group)


def empty(shape: tuple[int, ...], group: int, device: torch.device) -> Packed:
    data = torch.empty(stored_shape(shape), dtype=torch.int8, device=device)
    return Packed(data, groups.empty(shape, group, device))


def check(checkpoint: Checkpoint, name: str) -> None:
    groups.check(checkpoint, name, per_byte=PER_BYTE)


def group_sizes(checkpoint: Checkpoint, name: str) -> frozenset[int]:
    return groups.sizes(checkpoint, name, per_byte=PER_BYTE)


def load(checkpoint: Checkpoint, name: str) -> Packed:
    return groups.load(checkpoint, name)


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    return groups.multiply(packed.data, packed.scale).to(dtype)


def quantize(weight: Tensor, group: int) -> Packed:
    """Round to nearest with the group's largest magnitude at the end of the range."""
    folded = groups.fold(weight, group)
    scale = groups.storable(folded.abs().amax(-1, keepdim=True) / LARGEST)
    codes = (folded / scale).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    data = groups.unfold(codes, weight.shape[1]).contiguous()
    return Packed(data, scale.squeeze(-1).to(torch.bfloat16))
