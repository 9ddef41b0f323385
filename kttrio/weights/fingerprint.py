"""Tells whether a checkpoint is still the one that something was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from kttrio.weights.checkpoint import Checkpoint

SAMPLES, SAMPLE_BYTES = 64, 4096


def fingerprint(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """A hash of the files that hold the tensors `names`: 64 hexadecimal digits.

    Covers each file's name, size and header (names, shapes and dtypes of its tensors), and 64
    pieces of 4 KiB spread evenly over it. That notices another training state at once, and costs
    milliseconds where reading all would take minutes; a change of a few weights that lie between
    the pieces goes unnoticed. Where the checkpoint lies, and its dates, do not matter.
    """
    digest = hashlib.sha256()
    for file in sorted({checkpoint.entry(name).file for name in names}):
        _add(digest, file)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name}\n{size}\n".encode())
    with file.open("rb") as content:
        length = content.read(8)
        digest.update(length + content.read(int.from_bytes(length, "little")))
        begin = content.tell()
        for sample in range(SAMPLES):
            content.seek(begin + (size - begin) * sample // SAMPLES)
            digest.update(content.read(SAMPLE_BYTES))
