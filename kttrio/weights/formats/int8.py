"""Symmetric 8-bit weights with one scale per group of a row: weight = data * scale.

Stored as `NAME` int8 [out, in], codes -127..127, and `NAME_scale` bfloat16 [out, groups].
"""

from __future__ import annotations

import torch
from torch import Tensor

from kttrio.weights import groups
from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.formats.base import Packed

COMPANION = groups.COMPANION
GROUPS = (128, 64, 32)
LARGEST = 127.0


def claims(checkpoint: Checkpoint, name: str) -> bool:
    return name + COMPANION in checkpoint and checkpoint.entry(name).dtype is torch.int8


def stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def nbytes(shape: tuple[int, ...], group: int) -> int:
    return torch.Size(shape).numel() + groups.scale_bytes(shape, group)


def check(checkpoint: Checkpoint, name: str) -> None:
    entry = checkpoint.entry(name)
    if len(entry.shape) != 2:
        raise CheckpointError(f"tensor {name!r} in {entry.file} has scales but is no matrix")
    groups.check_scale(checkpoint, name, (entry.shape[0], entry.shape[1]))


def group_sizes(checkpoint: Checkpoint, name: str) -> frozenset[int]:
    columns = checkpoint.entry(name).shape[1]
    return groups.sizes_of(columns, checkpoint.entry(name + COMPANION).shape[1])


def load(checkpoint: Checkpoint, name: str) -> Packed:
    return Packed(checkpoint.read(name), checkpoint.read(name + COMPANION))


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    if packed.scale is None:
        raise ValueError("int8 weights come with scales")
    return groups.multiply(packed.data, packed.scale).to(dtype)


def quantize(weight: Tensor, group: int) -> Packed:
    """Round to nearest with the group's largest magnitude at the end of the range."""
    folded = groups.fold(weight, group)
    scale = groups.storable(folded.abs().amax(-1, keepdim=True) / LARGEST)
    codes = (folded / scale).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    data = groups.unfold(codes, weight.shape[1]).contiguous()
    return Packed(data, scale.squeeze(-1).to(torch.bfloat16))
