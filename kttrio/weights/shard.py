"""Writes one safetensors file, tensor by tensor, that has its name only once it is complete.

The format: https://github.com/huggingface/safetensors#format. The library's own writer wants all
tensors in memory at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kttrio.weights.checkpoint import DTYPES

UNFINISHED = ".unfinished"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_PAGE = 4096
_RESULT_ROOM = 1024  # for metadata that is known only when all tensors are


class Place(NamedTuple):
    """A tensor to come."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class ShardWriter:
    """A file at `path` of the tensors in `layout`, which may be put in any order.

    A context manager: without `commit` nothing is left of it. Its whole size is taken at once, so
    that a disk too small shows before the work is done.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, Place], metadata: Mapping[str, str]
    ) -> None:
        self._path, self._layout, self._metadata = path, layout, dict(metadata)
        self._offsets: dict[str, int] = {}
        self._data_bytes = 0
        for name, place in layout.items():
            self._offsets[name] = self._data_bytes
            self._data_bytes += place.nbytes
        self._header_bytes = _header_bytes(self._header())
        self._missing = set(layout)
        self._draft = path.with_name(path.name + UNFINISHED)
        self._file = os.open(self._draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.posix_fallocate(self._file, 0, self._header_bytes + self._data_bytes)
        except OSError:
            self._abandon()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file >= 0:
            self._abandon()

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place."""
        if Place(tensor.dtype, tuple(tensor.shape)) != self._layout[name]:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not as laid out")
        flat = tensor.contiguous().flatten().view(torch.uint8).numpy()
        self._write(self._header_bytes + self._offsets[name], flat.data)
        self._missing.discard(name)

    def commit(self, metadata: Mapping[str, str]) -> None:
        """Give the file its name, with more metadata; it is on the disk when this returns."""
        if self._missing:
            raise ValueError(f"never put: {', '.join(sorted(self._missing))}")
        self._metadata.update(metadata)
        text = self._header()
        room = self._header_bytes - _LENGTH_BYTES
        if len(text) > room:
            raise ValueError(f"{len(text) - room} bytes of metadata too many")
        self._write(0, memoryview(room.to_bytes(_LENGTH_BYTES, "little") + text.ljust(room)))
        os.fsync(self._file)
        self._close()
        self._draft.replace(self._path)
        sync_folder(self._path.parent)

    def _header(self) -> bytes:
        content: dict[str, object] = {"__metadata__": self._metadata}
        for name, place in self._layout.items():
            begin = self._offsets[name]
            content[name] = {
                "dtype": _NAMES[place.dtype],
                "shape": place.shape,
                "data_offsets": (begin, begin + place.nbytes),
            }
        return json.dumps(content, separators=(",", ":")).encode()

    def _write(self, offset: int, content: memoryview) -> None:
        while content:
            written = os.pwrite(self._file, content, offset)
            offset, content = offset + written, content[written:]

    def _close(self) -> None:
        os.close(self._file)
        self._file = -1

    def _abandon(self) -> None:
        self._close()
        self._draft.unlink(missing_ok=True)


def shard_bytes(layout: Mapping[str, Place]) -> int:
    """Size of the tensors of a file, without its header."""
    return sum(place.nbytes for place in layout.values())


def sync_folder(folder: Path) -> None:
    """Put what was renamed in a folder on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_text(path: Path, text: str) -> None:
    """Write a small file that is there whole or not at all."""
    draft = path.with_name(path.name + UNFINISHED)
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def _header_bytes(text: bytes) -> int:
    """Length and header, so that the tensors begin with a page."""
    return -(-(_LENGTH_BYTES + len(text) + _RESULT_ROOM) // _PAGE) * _PAGE
