"""Which tokens of a step attend together in layers of latent attention.

A sequence's new tokens stay in one group however many they are, because what is made of the keys
is made once for all of them; masks are made block by block, so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kttrio.layers.batch import Batch
from kttrio.layers.keys import (
    Piece,
    cache_rows,
    grouped,
    output_order,
    query_places,
    table_rows,
)


@dataclass(frozen=True, slots=True)
class SpanGroup:
    """New tokens of sequences of similar length, padded to a common one."""

    rows: Tensor | None  # [n * queries] of the batch; None: all of them, in order
    keys: Tensor  # [n, keys] rows of the cache; those a sequence has not repeat its first
    positions: Tensor  # [n, queries] of the queries in their sequences
    latest: int  # the largest position of a first query, or as large as it can be

    @property
    def size(self) -> int:
        return self.keys.shape[0]

    @property
    def num_keys(self) -> int:
        return self.keys.shape[1]

    @property
    def num_queries(self) -> int:
        return self.positions.shape[1]

    def reach(self, block: slice) -> int:
        """How many of the first keys the queries of a block see at most."""
        stop: int = block.stop
        return min(self.num_keys, self.latest + stop)

    def visible(self, block: slice) -> Tensor:
        """The causal mask [n, block, reach]."""
        keys = torch.arange(self.reach(block), device=self.keys.device)
        return keys <= self.positions[:, block].unsqueeze(2)

    def of(self, x: Tensor) -> Tensor:
        """This group's rows of x [tokens, ...]: [n, queries, ...]"""
        mine = x if self.rows is None else x[self.rows]
        return mine.view(*self.positions.shape, *x.shape[1:])


@dataclass(frozen=True, slots=True)
class SpanIndex:
    """Built once per step and used by every layer."""

    groups: tuple[SpanGroup, ...]
    order: Tensor | None  # [tokens] each token's row in the groups' outputs; None: as it stands


def index_spans(batch: Batch) -> SpanIndex:
    """Group whole sequences whose padding stays cheap; a static batch is a group of itself."""
    if batch.is_static:
        return SpanIndex((_static_group(batch),), None)
    spans = zip(batch.offsets, batch.starts, batch.lengths, strict=False)
    members = list(grouped(Piece(i, *span) for i, span in enumerate(spans)))
    if len(members) == 1 and len(set(batch.lengths)) == 1:
        return SpanIndex((_span_group(batch, members[0], all_rows=True),), None)
    groups = tuple(_span_group(batch, pieces, all_rows=False) for pieces in members)
    return SpanIndex(groups, output_order(batch, members))


def blocks(first: int, last: int, size: int) -> Iterator[slice]:
    """Consecutive slices from first to last, of `size` or what is left; of 1 if that is less."""
    step = max(size, 1)
    return (slice(begin, min(begin + step, last)) for begin in range(first, last, step))


def _span_group(batch: Batch, pieces: list[Piece], *, all_rows: bool) -> SpanGroup:
    rows, positions = query_places(batch, pieces)
    return SpanGroup(
        rows=None if all_rows else rows.flatten(),
        keys=cache_rows(batch, pieces),
        positions=positions,
        latest=max(piece.position for piece in pieces),
    )


def _static_group(batch: Batch) -> SpanGroup:
    """As if each sequence might see all that its pages could hold."""
    positions = batch.positions.unsqueeze(1)
    keys = table_rows(batch.page_table, positions + 1, batch.page_size)
    return SpanGroup(rows=None, keys=keys, positions=positions, latest=keys.shape[1] - 1)
