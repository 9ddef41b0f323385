"""What a weight format is, and how it is found: the file's name is the format's name."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

import kttrio.weights.formats as package
from kttrio.weights.checkpoint import Checkpoint, CheckpointError


class Packed(NamedTuple):
    """One matrix as its format stores it."""

    data: Tensor  # [out, in]
    scale: Tensor | None = None  # as the format says


class Format(Protocol):
    """A module of this folder."""

    COMPANION: str
    """Suffix of a second tensor that marks the format; empty for plain weights."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Memory of one matrix."""
        ...

    def check(self, checkpoint: Checkpoint, name: str) -> None:
        """Raise CheckpointError where the stored tensors cannot be this format."""
        ...

    def load(self, checkpoint: Checkpoint, name: str) -> Packed:
        """Read a checked matrix and put it into the format's own dtypes."""
        ...

    def dequantize(self, packed: Packed, dtype: torch.dtype) -> Tensor: ...

    def quantize(self, weight: Tensor) -> Packed: ...


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
def companions() -> dict[str, str]:
    """Suffix of the second tensor -> format, for the formats that have one."""
    marks = {name: find(name).COMPANION for name in names()}
    return {suffix: name for name, suffix in marks.items() if suffix}


def stored_format(checkpoint: Checkpoint, name: str) -> str:
    """The format of one stored matrix: decided tensor by tensor, by its companion."""
    for suffix, form in companions().items():
        if name + suffix in checkpoint:
            return form
    return "bf16"
