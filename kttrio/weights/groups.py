"""Scale groups along a row: what the integer formats share.

A row's columns are cut into groups of 32, 64 or 128, the last one maybe shorter; the weights of a
group share one bfloat16 scale. Codes are always chosen against the scale as it is stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.formats.base import Packed

SIZES = (32, 64, 128)
COMPANION = "_scale"
_TINY = 1e-30  # below, a quotient by the scale would leave the range of float32


def num_groups(columns: int, group: int) -> int:
    return -(-columns // group)


def _sizes(columns: int, found: int) -> frozenset[int]:
    """The group sizes with which `columns` make `found` groups; short rows leave several."""
    return frozenset(size for size in SIZES if num_groups(columns, size) == found)


def size(columns: int, found: int) -> int:
    """Of those group sizes; which one is all the same, for they differ in rows of one group."""
    return max(_sizes(columns, found))


def scale_bytes(shape: tuple[int, ...], group: int) -> int:
    rows, columns = shape
    return torch.bfloat16.itemsize * rows * num_groups(columns, group)


def empty(shape: tuple[int, ...], group: int, device: torch.device) -> Tensor:
    """Room for a matrix's scales."""
    rows, columns = shape
    return torch.empty(rows, num_groups(columns, group), dtype=torch.bfloat16, device=device)


def check(checkpoint: Checkpoint, name: str, *, per_byte: int) -> None:
    """Raise CheckpointError unless the stored matrix has a scale for each group.

    `per_byte`: how many codes a byte of it holds.
    """
    entry, scale = checkpoint.entry(name), checkpoint.entry(name + COMPANION)
    if len(entry.shape) != 2:
        raise CheckpointError(f"tensor {name!r} in {entry.file} has scales but is no matrix")
    rows, columns = entry.shape[0], entry.shape[1] * per_byte
    fits = len(scale.shape) == 2 and scale.shape[0] == rows and _sizes(columns, scale.shape[1])
    if not fits:
        raise CheckpointError(
            f"tensor {name + COMPANION!r} in {scale.file} has shape {list(scale.shape)}, which is "
            f"not one scale for 32, 64 or 128 weights along a row of {[rows, columns]}"
        )
    if scale.dtype is not torch.bfloat16:
        raise CheckpointError(
            f"tensor {name + COMPANION!r} in {scale.file} is {scale.dtype}, not bfloat16"
        )


def sizes(checkpoint: Checkpoint, name: str, *, per_byte: int) -> frozenset[int]:
    """The group sizes that a checked matrix may have been made with."""
    columns = checkpoint.entry(name).shape[1] * per_byte
    return _sizes(columns, checkpoint.entry(name + COMPANION).shape[1])


def load(checkpoint: Checkpoint, name: str) -> Packed:
    return Packed(checkpoint.read(name), checkpoint.read(name + COMPANION))


def fold(weight: Tensor, group: int) -> Tensor:
    """[rows, columns] -> [rows, groups, group] float32; a short last group is filled with zeros."""
    rows, columns = weight.shape
    padding = -columns % group
    whole = F.pad(weight, (0, padding)) if padding else weight
    return whole.float().view(rows, -1, group)


def unfold(codes: Tensor, columns: int) -> Tensor:
    """The inverse of `fold`, without the filling."""
    return codes.flatten(1)[:, :columns]


def storable(scale: Tensor) -> Tensor:
    """The scale as bfloat16 holds it, in float32, and never so small that it cannot divide."""
    rounded = scale.to(torch.bfloat16).float()
    return torch.where(rounded.abs() < _TINY, 1.0, rounded)


def multiply(codes: Tensor, scale: Tensor | None) -> Tensor:
    """codes [rows, columns] times scale [rows, groups], in float32."""
    if scale is None:
        raise ValueError("integer weights come with scales")
    columns = codes.shape[1]
    folded = fold(codes, size(columns, scale.shape[1]))
    return unfold(folded.mul(scale.float().unsqueeze(-1)), columns)
