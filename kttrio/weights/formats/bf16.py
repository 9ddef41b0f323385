"""Plain weights. Experts are held as bfloat16; other float dtypes are rounded to it."""

from __future__ import annotations

import torch
from torch import Tensor

from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.formats.base import Packed

COMPANION = ""
GROUPS = (0,)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def claims(_checkpoint: Checkpoint, _name: str) -> bool:
    return False


def stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def nbytes(shape: tuple[int, ...], _group: int) -> int:
    return torch.bfloat16.itemsize * torch.Size(shape).numel()


def empty(shape: tuple[int, ...], _group: int, device: torch.device) -> Packed:
    return Packed(torch.empty(shape, dtype=torch.bfloat16, device=device))


def check(checkpoint: Checkpoint, name: str) -> None:
    entry = checkpoint.entry(name)
    if entry.dtype not in FLOATS:
        raise CheckpointError(
            f"tensor {name!r} in {entry.file} is {entry.dtype} without the scales that would "
            "say what it means"
        )


def group_sizes(_checkpoint: Checkpoint, _name: str) -> frozenset[int]:
    return frozenset(GROUPS)


def load(checkpoint: Checkpoint, name: str) -> Packed:
    """The tensor as stored; `quantize` rounds it where only bfloat16 will do."""
    return Packed(checkpoint.read(name))


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    return packed.data.to(dtype)


def quantize(weight: Tensor, _group: int) -> Packed:
    return Packed(weight.to(torch.bfloat16))
