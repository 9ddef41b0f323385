"""Which tokens of a step attend together in layers of latent attention.

A sequence's new tokens stay in one group however many they are, because what is made of the keys
is made once for all of them; masks are made block by block, so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kttrio.layers.batch import Batch
from kttrio.layers.keys import (
    Piece,
    grouped,
    output_order,
    query_places,
    table_rows,
    tables_of,
)


@dataclass(frozen=True)
class SpanGroup:
    """New tokens of sequences of similar length, padded to a common one by repeating the last."""

    rows: Tensor | None  # [n * queries] of the batch; None: all of them, in order
    pages: Tensor  # [n, pages] of the sequences
    page_size: int
    positions: Tensor  # [n, queries] of the queries in their sequences
    num_keys: int  # of the longest sequence
    latest: int  # the largest position of a first query, or as large as it can be

    @cached_property
    def keys(self) -> Tensor:
        """Rows of the cache [n, keys]; those a sequence has not repeat its first."""
        own = self.positions[:, -1:] + 1
        return table_rows(self.pages, own, self.page_size)[:, : self.num_keys]

    @property
    def size(self) -> int:
        return self.positions.shape[0]

    @property
    def num_queries(self) -> int:
        return self.positions.shape[1]

    def reach(self, block: slice) -> int:
        """How many of the first keys the queries of a block see at most."""
        stop: int = block.stop
        return min(self.num_keys, self.latest + stop)

    def visible(self, block: slice) -> Tensor:
        """The causal mask [n, block, reach]."""
        keys = torch.arange(self.reach(block), device=self.positions.device)
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


def index_spans(batch: Batch, *, decodes_together: bool = False) -> SpanIndex:
    """Group whole sequences whose padding stays cheap; a static batch is a group of itself.

    `decodes_together`: those of one token are a group whatever their lengths, and come first.
    """
    if batch.is_static:
        return SpanIndex((_static_group(batch),), None)
    spans = zip(batch.offsets, batch.starts, batch.lengths, strict=False)
    pieces = [Piece(i, *span) for i, span in enumerate(spans)]
    count = batch.num_decodes if decodes_together else 0
    members = [*([pieces[:count]] if count else []), *grouped(pieces[count:])]
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
    num_keys = max(piece.keys for piece in pieces)
    return SpanGroup(
        rows=None if all_rows else rows.flatten(),
        pages=tables_of(batch, pieces, num_keys),
        page_size=batch.page_size,
        positions=positions,
        num_keys=num_keys,
        latest=max(piece.position for piece in pieces),
    )


def _static_group(batch: Batch) -> SpanGroup:
    """As if each sequence might see all that its pages could hold."""
    num_keys = batch.page_table.shape[1] * batch.page_size
    return SpanGroup(
        rows=None,
        pages=batch.page_table,
        page_size=batch.page_size,
        positions=batch.positions.unsqueeze(1),
        num_keys=num_keys,
        latest=num_keys - 1,
    )
