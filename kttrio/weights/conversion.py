"""A directory of quantised experts: one shard for each layer, and an index when all are there.

    experts-00001-of-00048.safetensors   complete once it has this name
    model.safetensors.index.json         written last

Each shard says in its metadata what it was made from and how, so that a conversion that was
killed goes on where it was, and never mixes with another.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kttrio.weights.checkpoint import INDEX, CheckpointError
from kttrio.weights.formats import base as formats
from kttrio.weights.loader import ExpertWeights
from kttrio.weights.quantize import Deviation, Quantised, Target
from kttrio.weights.shard import (
    UNFINISHED,
    Place,
    ShardWriter,
    shard_bytes,
    write_text,
)

log = logging.getLogger(__name__)

VERSION = "1"
LOCK = "conversion.lock"
_SHARD = "experts-{:05}-of-{:05}.safetensors"
_SHARDS = "experts-*-of-*.safetensors*"
_SPARE_BYTES = 64 * 2**20  # headers, index, and a little air


class NoRoomError(Exception):
    """The disk cannot take what is to be written."""


class BusyError(Exception):
    """Another process writes into the directory."""


class Identity(NamedTuple):
    """What a conversion is made from, and how."""

    source: str  # see fingerprint.py
    target: Target

    @property
    def metadata(self) -> dict[str, str]:
        return {
            "format": "pt",
            "kttrio": VERSION,
            "method": self.target.form,
            "group_size": str(self.target.group),
            "source": self.source,
        }


class Conversion:
    """The directory, made if need be, and held against other processes until the context ends.

    One that is complete is only looked at. Raises CheckpointError where there are shards of another
    conversion; BusyError where another process is at it, unless `wait`.
    """

    def __init__(
        self,
        directory: Path,
        identity: Identity,
        layers: Sequence[ExpertWeights],
        *,
        wait: bool = False,
    ) -> None:
        self.directory, self.layers = directory, layers
        self._identity = identity
        with ExitStack() as undo:
            if not self._is_complete():
                directory.mkdir(parents=True, exist_ok=True)
                undo.callback(os.close, _lock(directory / LOCK, wait=wait))
                for draft in directory.glob(f"*{UNFINISHED}"):
                    draft.unlink()
            self.deviations = self._found()
            self._held = undo.pop_all()

    def __enter__(self) -> Conversion:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._held.close()

    @property
    def missing(self) -> list[int]:
        """The layers that are still to be written."""
        return [layer for layer in range(len(self.layers)) if layer not in self.deviations]

    def path(self, layer: int) -> Path:
        """The shard of a layer: its place among `layers`, from 0."""
        return self.directory / _SHARD.format(layer + 1, len(self.layers))

    def layer_bytes(self, layer: int) -> int:
        """Size of a layer's tensors in the new format."""
        return shard_bytes(self._layout(layer))

    def check_room(self) -> None:
        """Raise NoRoomError where the disk cannot take what is missing."""
        if not self.missing:
            return
        needed = _SPARE_BYTES + sum(self.layer_bytes(layer) for layer in self.missing)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise NoRoomError(
                f"{self.directory} needs {needed / 1e9:.2f} GB more, but its disk has "
                f"{free / 1e9:.2f} GB left"
            )

    def write(self, layer: int, matrices: Iterable[Quantised]) -> None:
        """Write one layer's matrices, in any order; all of the shard is there, or nothing."""
        deviation = Deviation()
        metadata = self._identity.metadata | {"layer": str(layer)}
        with ShardWriter(self.path(layer), self._layout(layer), metadata) as shard:
            for part, packed, cost in matrices:
                shard.put(part.name, packed.data)
                if packed.scale is not None:
                    shard.put(part.name + self._companion, packed.scale)
                deviation = deviation.plus(cost)
            shard.commit(_as_text(deviation))
        self.deviations[layer] = deviation

    def finish(self) -> None:
        """Write the index, if need be: from now on the directory is a checkpoint of experts."""
        if self._is_complete():
            return
        where = {
            name: self.path(layer).name
            for layer in range(len(self.layers))
            for name in self._layout(layer)
        }
        total = sum(self.layer_bytes(layer) for layer in range(len(self.layers)))
        metadata = self._identity.metadata | {"total_size": total}
        text = json.dumps({"metadata": metadata, "weight_map": where}, indent=1)
        write_text(self.directory / INDEX, text + "\n")
        (self.directory / LOCK).unlink(missing_ok=True)  # who waits for it finds nothing to do

    def _is_complete(self) -> bool:
        shards = [self.path(layer) for layer in range(len(self.layers))]
        return (self.directory / INDEX).exists() and all(path.exists() for path in shards)

    @property
    def _companion(self) -> str:
        return formats.find(self._identity.target.form).COMPANION

    def _layout(self, layer: int) -> dict[str, Place]:
        layout = {}
        for part in self.layers[layer].all_parts():
            data, scale = _places(self._identity.target, part.shape)
            layout[part.name] = data
            if scale is not None:
                layout[part.name + self._companion] = scale
        return layout

    def _found(self) -> dict[int, Deviation]:
        """Layers that a run before has written."""
        found = {}
        strangers = set(self.directory.glob(_SHARDS))
        for layer in range(len(self.layers)):
            path = self.path(layer)
            if path in strangers:
                found[layer] = self._check(path)
                strangers.remove(path)
        for stranger in sorted(strangers):
            raise CheckpointError(
                f"{stranger} belongs to a conversion of another number of layers, not "
                f"{len(self.layers)}; write into another directory"
            )
        return found

    def _check(self, path: Path) -> Deviation:
        metadata = _read_metadata(path)
        for name, wanted in self._identity.metadata.items():
            given = metadata.get(name)
            if given != wanted:
                raise CheckpointError(
                    f"{path} was made with another {_MEANINGS[name]}: {given}, not {wanted}; "
                    "write into another directory, or delete this one and begin anew"
                )
        return _from_text(metadata)


_MEANINGS = {
    "format": "kind of tensors",
    "kttrio": "version of this format",
    "method": "method",
    "group_size": "group size",
    "source": "source",
}


def is_conversion(directory: Path) -> bool:
    """Whether a conversion has written shards into the directory."""
    return any(directory.glob(_SHARDS))


def is_unfinished(directory: Path) -> bool:
    """Whether a conversion into the directory was begun and not brought to its end."""
    return not (directory / INDEX).exists() and is_conversion(directory)


def is_empty(directory: Path) -> bool:
    """Whether there is nothing but what a conversion leaves that wrote no layer."""
    names = (path.name for path in directory.iterdir())
    return all(name == LOCK or name.endswith(UNFINISHED) for name in names)


def made_from(directory: Path) -> str | None:
    """Fingerprint of what a conversion into the directory was made from; None: it holds none."""
    shard = next(directory.glob(_SHARDS), None)
    return None if shard is None else _read_metadata(shard).get("source")


def find_stranger(directory: Path) -> Path | None:
    """Something in the directory that no conversion writes, if there is any.

    Beside another checkpoint a conversion would leave its index in place of the other's.
    """
    ours = (_SHARDS, LOCK, INDEX, INDEX + UNFINISHED)
    strangers = (path for path in directory.iterdir() if not any(map(path.match, ours)))
    return min(strangers, default=None)


@cache
def _places(target: Target, shape: tuple[int, ...]) -> tuple[Place, Place | None]:
    """What quantising a matrix of that shape will give: its data and, if any, its scales."""
    nothing = torch.empty(shape, device="meta")
    data, scale = formats.find(target.form).quantize(nothing, target.group)
    return _place(data), None if scale is None else _place(scale)


def _place(tensor: Tensor) -> Place:
    return Place(tensor.dtype, tuple(tensor.shape))


def _read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {error}; delete it and it is made again"
        ) from error


def _as_text(deviation: Deviation) -> dict[str, str]:
    return {name: repr(value) for name, value in deviation._asdict().items()} | {
        "relative_error": f"{deviation.relative:.5f}"
    }


def _from_text(metadata: dict[str, str]) -> Deviation:
    return Deviation(float(metadata["square_error"]), float(metadata["square_weight"]))


def _lock(path: Path, *, wait: bool) -> int:
    """An open file that no other process has locked; the lock ends with this process at last."""
    opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            os.close(opened)
            raise BusyError(f"another process is writing into {path.parent}") from None
        log.warning("waiting for another process that is writing into %s", path.parent)
        fcntl.flock(opened, fcntl.LOCK_EX)
    return opened
