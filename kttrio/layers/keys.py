"""Which keys each query of a step may see, and where they lie in the paged cache.

Queries attend in groups padded to a common size. What is masked is never read: its place is
taken by the sequence's first token, so garbage in lent pages cannot reach a sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from kttrio.layers.batch import Batch, sent

QUERY_BLOCK = 256  # queries of a long chunk that attend together
MAX_BLOCK_SCORES = 1 << 23  # of one such block and head: bounds the mask of a long context
MAX_SCORES = 1 << 22  # of one group and head
MAX_KEYS = 1 << 18  # gathered for one group
CHEAP_PADDING = 1 << 16  # scores; more than this is only padded where it at most doubles the work


class Piece(NamedTuple):
    """Consecutive queries of one sequence."""

    sequence: int
    row: int  # of the first query in the batch
    position: int  # of the first query in its sequence
    queries: int

    @property
    def keys(self) -> int:
        return self.position + self.queries


@dataclass(frozen=True, slots=True)
class KeyGroup:
    """Sequences (or blocks of one) that attend as one dense tensor."""

    size: int  # n
    rows: Tensor | None  # [n * queries] of the batch; None: all of them, in order
    keys: Tensor  # [n, keys] rows of the cache, pages laid end to end
    mask: Tensor  # [n, 1, queries, keys] bool, True where the query sees the key


@dataclass(frozen=True, slots=True)
class KeyIndex:
    """Where a step's queries find their keys; built once and used by every attention layer."""

    groups: tuple[KeyGroup, ...]
    order: Tensor | None  # [tokens] each token's row in the groups' outputs; None: as it stands


def index_keys(batch: Batch) -> KeyIndex:
    """Cut the batch into groups whose padding stays cheap; a static one is a group of itself."""
    if batch.is_static:
        return KeyIndex((_static_group(batch),), None)
    members = list(grouped(_pieces(batch)))
    if len(members) == 1 and batch.num_decodes == len(batch.lengths):
        return KeyIndex((_key_group(batch, members[0], all_rows=True),), None)
    groups = tuple(_key_group(batch, pieces, all_rows=False) for pieces in members)
    return KeyIndex(groups, output_order(batch, members))


def output_order(batch: Batch, members: list[list[Piece]]) -> Tensor:
    """Where the groups' outputs, laid end to end, hold each token of the batch: [tokens]"""
    rows = torch.tensor([row for pieces in members for row in _output_rows(pieces)])
    order = torch.empty(batch.num_tokens, dtype=torch.int64)
    real = rows >= 0
    order[rows[real]] = real.nonzero().squeeze(1)
    return order.to(batch.kv_index.device, non_blocking=True)


def _pieces(batch: Batch) -> Iterator[Piece]:
    for sequence, (start, length, offset) in enumerate(
        zip(batch.starts, batch.lengths, batch.offsets, strict=False)
    ):
        block = min(QUERY_BLOCK, max(MAX_BLOCK_SCORES // (start + length), 1))
        for first in range(0, length, block):
            queries = min(block, length - first)
            yield Piece(sequence, offset + first, start + first, queries)


def grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Join pieces of similar size, longest first; a group keeps the batch's order."""
    ordered = sorted(pieces, key=lambda piece: (piece.queries > 1, piece.queries, piece.keys))
    for _, alike in groupby(reversed(ordered), key=lambda piece: piece.queries > 1):
        group: list[Piece] = []
        queries = keys = scores = 0
        for piece in alike:
            queries, keys = max(queries, piece.queries), max(keys, piece.keys)
            scores += piece.queries * piece.keys
            size = len(group) + 1
            padded = size * queries * keys
            wasteful = padded > max(2 * scores, CHEAP_PADDING)
            if group and (wasteful or size * keys > MAX_KEYS or padded > MAX_SCORES):
                yield sorted(group)
                group = []
                queries, keys, scores = piece.queries, piece.keys, piece.queries * piece.keys
            group.append(piece)
        yield sorted(group)


def _output_rows(pieces: list[Piece]) -> Iterator[int]:
    """The batch row of every query of a group, -1 for padding."""
    queries = max(piece.queries for piece in pieces)
    for piece in pieces:
        yield from range(piece.row, piece.row + piece.queries)
        yield from (-1 for _ in range(queries - piece.queries))


def _key_group(batch: Batch, pieces: list[Piece], *, all_rows: bool) -> KeyGroup:
    rows, positions = query_places(batch, pieces)
    num_keys = max(piece.keys for piece in pieces)
    tables = tables_of(batch, pieces, num_keys)
    keys = table_rows(tables, positions[:, -1:] + 1, batch.page_size)[:, :num_keys]
    mask = torch.arange(keys.shape[1], device=keys.device) <= positions.unsqueeze(2)
    return KeyGroup(
        size=len(pieces),
        rows=None if all_rows else rows.flatten(),
        keys=keys,
        mask=mask.unsqueeze(1),
    )


def _static_group(batch: Batch) -> KeyGroup:
    last = batch.positions.unsqueeze(1)
    keys = table_rows(batch.page_table, last + 1, batch.page_size)
    mask = torch.arange(keys.shape[1], device=keys.device) <= last
    return KeyGroup(len(keys), None, keys, mask[:, None, None])


def query_places(batch: Batch, pieces: list[Piece]) -> tuple[Tensor, Tensor]:
    """Row in the batch and position in its sequence of each query: both [n, queries].

    A padding query repeats its piece's last one; its output is dropped.
    """
    device = batch.kv_index.device
    queries = torch.arange(max(piece.queries for piece in pieces), device=device)
    row, position, real = (
        sent(column, device).unsqueeze(1)
        for column in zip(*(piece[1:] for piece in pieces), strict=True)
    )
    query = torch.minimum(queries, real - 1)
    return row + query, position + query


def tables_of(batch: Batch, pieces: list[Piece], num_keys: int) -> Tensor:
    """The pages of each piece's sequence, enough for so many keys: [n, pages]"""
    device = batch.page_table.device
    sequences = sent([piece.sequence for piece in pieces], device)
    return batch.page_table[sequences, : -(-num_keys // batch.page_size)]


def table_rows(tables: Tensor, num_keys: Tensor, page_size: int) -> Tensor:
    """Pages [n, pages] laid end to end as rows of the cache: [n, pages * page_size]. In the place
    of keys beyond a sequence's own `num_keys` [n, 1] stands its first."""
    offset = torch.arange(page_size, device=tables.device)
    rows = (tables.unsqueeze(2) * page_size + offset).flatten(1)
    key = torch.arange(rows.shape[1], device=tables.device)
    return torch.where(key < num_keys, rows, rows[:, :1])
