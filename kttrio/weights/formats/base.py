"""What a weight format is, and how it is found: the file's name is the format's name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

import kttrio.weights.formats as package
from kttrio.weights.checkpoint import Checkpoint, CheckpointError

PLAIN = "bf16"


class Packed(NamedTuple):
    """One matrix as its format stores it."""

    data: Tensor  # [out, in]; int4 holds two to a byte: [out, in / 2]
    scale: Tensor | None = None  # as the format says

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def map(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """The same of what `change` makes of each tensor."""
        return Packed(change(self.data), None if self.scale is None else change(self.scale))

    def copy_(self, source: Packed) -> None:
        """Take over another one's bits; like tensors' own, it does not wait for a device where
        the memory of the other is pinned."""
        self.data.copy_(source.data, non_blocking=True)
        if self.scale is not None and source.scale is not None:
            self.scale.copy_(source.scale, non_blocking=True)


def is_finite(packed: Packed) -> bool:
    """Whether a matrix with scales means numbers: plain weights are taken as they are."""
    data, scale = packed
    if scale is None:
        return True
    if data.dtype is torch.float8_e4m3fn and (data.view(torch.uint8) & 0x7F == 0x7F).any():
        return False
    return bool(scale.isfinite().all())


class Format(Protocol):
    """A module of this folder."""

    COMPANION: str
    """Suffix of a second tensor, the scales; empty for plain weights."""
    GROUPS: tuple[int, ...]
    """How many weights along a row may share a scale, the usual number first; 0: no scales."""

    def claims(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether the stored matrix is of this format. Plain weights are what nobody claims."""
        ...

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor of a matrix."""
        ...

    def nbytes(self, shape: tuple[int, ...], group: int) -> int:
        """Memory of one matrix."""
        ...

    def empty(self, shape: tuple[int, ...], group: int, device: torch.device) -> Packed:
        """A matrix in this format, uninitialised; `group` is one of GROUPS."""
        ...

    def check(self, checkpoint: Checkpoint, name: str) -> None:
        """Raise CheckpointError where the stored tensors cannot be this format."""
        ...

    def group_sizes(self, checkpoint: Checkpoint, name: str) -> frozenset[int]:
        """Those of GROUPS that a checked matrix may have been made with."""
        ...

    def load(self, checkpoint: Checkpoint, name: str) -> Packed:
        """Read a checked matrix and put it into the format's own dtypes."""
        ...

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor: ...

    def quantize(self, weight: Tensor, group: int) -> Packed:
        """`group` is one of GROUPS."""
        ...


@cache
def names() -> tuple[str, ...]:
    found = {module.name for module in iter_modules(package.__path__)}
    return tuple(sorted(found - {"base"}))


@cache
def find(name: str) -> Format:
    """The format of that name; CheckpointError, with the known ones, when there is none."""
    known = names()
    if name not in known:
        raise CheckpointError(f"unknown weight format {name!r}; known: {', '.join(known)}")
    return cast("Format", import_module(f"{package.__name__}.{name}"))


@cache
def companions() -> frozenset[str]:
    """Suffixes of second tensors."""
    return frozenset(find(name).COMPANION for name in names()) - {""}


def stored_format(checkpoint: Checkpoint, name: str) -> str:
    """The format of one stored matrix: decided tensor by tensor, by dtype and companion."""
    for form in names():
        if find(form).claims(checkpoint, name):
            return form
    return PLAIN
