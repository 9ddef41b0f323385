"""e4m3 weights with one scale per block of 128 x 128: weight = data * scale.

The layout of the published FP8 checkpoints: `NAME` and `NAME_scale_inv`, the latter
[ceil(out / 128), ceil(in / 128)] in any float dtype, held as float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.formats.base import Packed

COMPANION = "_scale_inv"
BLOCK = 128
GROUPS = (BLOCK,)
LARGEST = 448.0  # of e4m3
VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # of each code
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


def claims(checkpoint: Checkpoint, name: str) -> bool:
    return name + COMPANION in checkpoint


def stored_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def nbytes(shape: tuple[int, ...], _group: int) -> int:
    rows, columns = scale_shape(shape)
    return torch.Size(shape).numel() + 4 * rows * columns


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def empty(shape: tuple[int, ...], _group: int, device: torch.device) -> Packed:
    data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    return Packed(data, torch.empty(scale_shape(shape), device=device))


def check(checkpoint: Checkpoint, name: str) -> None:
    entry, scale = checkpoint.entry(name), checkpoint.entry(name + COMPANION)
    if entry.dtype is not torch.float8_e4m3fn:
        raise CheckpointError(
            f"tensor {name!r} in {entry.file} has scales ({COMPANION}) but is {entry.dtype}, "
            "not float8_e4m3fn"
        )
    if len(entry.shape) != 2 or scale.shape != scale_shape(entry.shape):
        raise CheckpointError(
            f"tensor {name + COMPANION!r} in {scale.file} has shape {list(scale.shape)}, which is "
            f"not one scale per {BLOCK} x {BLOCK} block of {list(entry.shape)}"
        )
    if scale.dtype not in SCALES:
        raise CheckpointError(
            f"tensor {name + COMPANION!r} in {scale.file} is {scale.dtype}, not a float"
        )


def group_sizes(_checkpoint: Checkpoint, _name: str) -> frozenset[int]:
    return frozenset(GROUPS)


def load(checkpoint: Checkpoint, name: str) -> Packed:
    return Packed(checkpoint.read(name), checkpoint.read(name + COMPANION).float())


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    if packed.scale is None:
        raise ValueError("fp8 weights come with scales")
    wide = packed.scale.repeat_interleave(BLOCK, 1)[:, : packed.data.shape[1]]
    weight = _values(packed.data)
    for rows, scale in zip(torch.split(weight, BLOCK), wide, strict=True):
        rows.mul_(scale)
    return weight.to(dtype)


def _values(data: Tensor) -> Tensor:
    """The numbers in float32; looked up, which takes a third of torch's own conversion."""
    codes = data.contiguous().view(torch.uint8).flatten().int()
    return VALUES.index_select(0, codes).view(data.shape)


def quantize(weight: Tensor, _group: int) -> Packed:
    """Round to nearest with the block's largest magnitude at the end of e4m3's range."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-12) / LARGEST
    data = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).view(padded.shape)
    return Packed(data[:rows, :columns].to(torch.float8_e4m3fn), scale)
