"""What a server knows of the experts in use, kept from one run to the next.

The file is a recording of one step, as recording.py describes it, so that it can be shown and given
to another server like any other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kttrio.experts.recording import RecordingError, read_counts, replace_stat

log = logging.getLogger(__name__)


def state_file(cache_dir: Path, fingerprint: str) -> Path:
    """The one of a checkpoint, by default."""
    return cache_dir.expanduser() / f"placement-{fingerprint[:16]}.pt"


class ExpertState:
    """A file with how often each expert was chosen."""

    def __init__(self, path: Path, layers: Sequence[int], shape: tuple[int, int]) -> None:
        """`layers`: the numbers of those that have experts; `shape`: of all [layers, experts]."""
        self.path, self._layers, self._shape = path, list(layers), shape

    def write(self, counts: Tensor) -> None:
        """Counts [layers with experts, experts], rounded; what was there is replaced, by all of it
        or not at all. OSError."""
        table = torch.zeros(1, *self._shape, dtype=torch.int64)
        table[0, self._layers] = counts.round().long()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_stat(self.path, table)

    def read(self) -> Tensor | None:
        """Counts [layers, experts] of all layers; None where there are none of this model, which
        is said aloud."""
        try:
            counts = read_counts(self.path).sum(0)
        except FileNotFoundError:
            log.info("%s is not there yet: no experts in use are known", self.path)
            return None
        except (OSError, RecordingError) as error:
            log.warning("the experts in use are not known: %s", error)
            return None
        if tuple(counts.shape) != self._shape or counts.sum() > counts[self._layers].sum():
            log.warning("the experts in use are not known: %s is of another model", self.path)
            return None
        log.info("the experts in use are known from %s", self.path)
        return counts
