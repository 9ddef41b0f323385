"""Files of recorded activations, laid out as SGLang's expert distribution recorder has them.

`stat` is one dict with the counts of every step; the detailed modes have a list of records, one for
each step. Which experts were on the device is in a file of its own. Nothing but tensors and plain
values stands in them, so that both sides read the other's files with `weights_only=True`. What is
put into them is gathered in recorder.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAME = "expert_distribution_recorder_"
_RANK = 0  # there is one process


class RecordingError(ValueError):
    """A file does not hold recorded activations; the message names the file and what it lacks."""


def write_stat(directory: Path, counts: Tensor) -> Path:
    """counts [steps, layers, experts] int32, how often each expert was chosen -> the new file.

    OSError where it cannot be written.
    """
    return _write(directory / f"{_NAME}{time.time()}.pt", _stat(counts))


def replace_stat(path: Path, counts: Tensor) -> None:
    """The same into this very file, whether it is there or not. OSError where it cannot be
    written; what was there is then still there."""
    new = _write(path.with_name(f"{path.name}.{os.getpid()}.{time.time()}"), _stat(counts))
    try:
        new.replace(path)
    except OSError:
        new.unlink()
        raise


def write_residents(directory: Path, residents: Tensor) -> Path:
    """Which experts were on the device: residents [steps, layers, experts] bool, all of a layer
    without experts -> the new file. OSError where it cannot be written."""
    path = directory / f"gpu_expert_distribution_{time.time()}.pt"
    return _write(path, {"gpu_expert_masks": residents})


def write_records(
    directory: Path, records: Sequence[dict[str, Any]], *, num_layers: int, num_experts: int
) -> Path:
    """One record for each step, with `global_physical_count` [layers, experts] int32 among others
    -> the new file. OSError where it cannot be written."""
    content = {
        "records": list(records),
        "last_physical_to_logical_map": torch.arange(num_experts).repeat(num_layers, 1),
    }
    return _write(directory / f"{_NAME}{time.time()}_{_RANK}.pt", content)


def read_counts(path: Path) -> Tensor:
    """How often each expert was chosen: [steps, layers, experts] int64, from a file of any mode.

    Steps of zeros are those for which the recorder had room left; layers without experts are
    zeros, too. RecordingError where the file holds something else, OSError where it cannot be read.
    """
    content = _load(path)
    if "logical_count" in content:
        return _checked(content["logical_count"], path)
    if "records" in content and "last_physical_to_logical_map" in content:
        return _logical(content["records"], content["last_physical_to_logical_map"], path)
    raise RecordingError(
        f"{path} has neither logical_count nor records: no file of an expert distribution recorder"
    )


def _stat(counts: Tensor) -> dict[str, Any]:
    return {
        "rank": _RANK,
        "logical_count": counts,
        "average_utilization_rate_over_window": None,  # of devices that share the experts
    }


def _write(path: Path, content: dict[str, Any]) -> Path:
    """A new file, all of it or none. Others may not read it: tokens of requests may be in it."""
    file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
    try:
        with file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # the latter is torch's own, where the disk is full
        path.unlink()
        raise OSError(f"{path} cannot be written: {error}") from error
    return path


def _load(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file makes the readers of torch raise nearly anything
        raise RecordingError(f"{path} is no torch file of tensors and plain values") from error
    if not isinstance(content, dict):
        raise RecordingError(f"{path} holds a {type(content).__name__}, not a recorder's dict")
    return content


def _logical(records: Any, experts: Any, path: Path) -> Tensor:
    """Counts of places, of which an expert may have several, as counts of experts.

    experts [layers, places]: which one is there.
    """
    try:
        counts = torch.stack([record["global_physical_count"] for record in records])
        places = experts.long().expand(counts.shape)
        num_experts = int(experts.max()) + 1
        logical = torch.zeros(*counts.shape[:2], num_experts, dtype=torch.int64)
        logical.scatter_add_(2, places, counts.long())
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise RecordingError(f"{path}: its records do not have counts of one shape") from error
    return _checked(logical, path)


def _checked(counts: Any, path: Path) -> Tensor:
    if not isinstance(counts, Tensor) or counts.dim() != 3:
        shape = list(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise RecordingError(f"{path}: the counts are {shape}, not [steps, layers, experts]")
    if counts.layout is not torch.strided or counts.is_meta or counts.is_complex():
        raise RecordingError(f"{path}: the counts are no plain tensor of numbers")
    whole = counts.long()
    if not torch.equal(whole.clamp(min=0).double(), counts.double()):
        raise RecordingError(f"{path}: some counts are negative or no whole numbers")
    return whole
