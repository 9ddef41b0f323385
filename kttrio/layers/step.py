"""What the layers of a model share of one step: each piece computed once, when first asked for."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from kttrio.layers.backend import Backend
from kttrio.layers.batch import Batch
from kttrio.layers.gather import Gather
from kttrio.layers.kernels import open_kernels
from kttrio.layers.keys import KeyIndex, index_keys
from kttrio.layers.paged import Kernels, PageIndex, index_pages
from kttrio.layers.recurrence import Recurrence, open_recurrence
from kttrio.layers.rotary import Rope, Rotation
from kttrio.layers.runs import RunIndex, index_runs
from kttrio.layers.spans import SpanIndex, index_spans


class Step:
    """One pass of a batch through a model; made anew for every step."""

    def __init__(self, batch: Batch, backend: Backend = "torch") -> None:
        self.batch = batch
        self.kernels: Kernels | None = open_kernels(backend)
        """Of attention; None: torch computes it."""
        self.gather = Gather()
        self.recurrence: Recurrence = open_recurrence(backend, self.gather)
        self.selections: list[Tensor | None] | None = None
        """What the last indexer chose for each span group; layers without one of their own follow.
        [n, queries, top_k] int32 positions in ascending order; None: all keys."""
        self._rotations: dict[Rope, Rotation] = {}

    @cached_property
    def keys(self) -> KeyIndex:
        """For layers of attention that torch computes."""
        return index_keys(self.batch)

    @cached_property
    def pages(self) -> PageIndex:
        """For those that kernels compute."""
        return index_pages(self.batch)

    @cached_property
    def spans(self) -> SpanIndex:
        """For layers of latent attention."""
        return index_spans(self.batch, decodes_together=self.kernels is not None)

    @cached_property
    def runs(self) -> RunIndex:
        """For recurrent layers."""
        return index_runs(self.batch)

    def rotation(self, rope: Rope) -> Rotation:
        """The angles of the batch's positions."""
        if rope not in self._rotations:
            places = self.batch.rope_positions
            positions = self.batch.positions if places is None else places
            self._rotations[rope] = rope.rotation(positions)
        return self._rotations[rope]
