"""Gated full attention over the paged KV cache, and which keys each query may see.

Queries attend in groups padded to a common size. What is masked is never read: its place is
taken by the sequence's first token, so garbage in lent pages cannot reach a sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kttrio.layers.batch import Batch
from kttrio.layers.cache import AttentionCache
from kttrio.layers.linear import Linear
from kttrio.layers.norm import RMSNorm
from kttrio.layers.rotary import Rotation

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
    keys: Tensor  # [n * keys] rows of the cache, pages laid end to end
    mask: Tensor  # [n, 1, queries, keys] bool, True where the query sees the key


@dataclass(frozen=True, slots=True)
class KeyIndex:
    """Where a step's queries find their keys; built once and used by every attention layer."""

    written: Tensor  # [tokens] rows of the cache that this step fills
    groups: tuple[KeyGroup, ...]
    order: Tensor | None  # [tokens] each token's row in the groups' outputs; None: as it stands


def index_keys(batch: Batch, page_size: int) -> KeyIndex:
    """Cut the batch into groups whose padding stays cheap."""
    members = list(_grouped(_pieces(batch)))
    if len(members) == 1 and batch.num_decodes == len(batch.lengths):
        return KeyIndex(
            batch.kv_index, (_key_group(batch, members[0], page_size, all_rows=True),), None
        )
    groups = tuple(_key_group(batch, pieces, page_size, all_rows=False) for pieces in members)
    outputs = [row for pieces in members for row in _output_rows(pieces)]
    order = torch.empty(batch.num_tokens, dtype=torch.int64)
    rows = torch.tensor(outputs)
    real = rows >= 0
    order[rows[real]] = real.nonzero().squeeze(1)
    return KeyIndex(batch.kv_index, groups, order.to(batch.kv_index.device))


def _pieces(batch: Batch) -> Iterator[Piece]:
    for sequence, (start, length, offset) in enumerate(
        zip(batch.starts, batch.lengths, batch.offsets, strict=False)
    ):
        block = min(QUERY_BLOCK, max(MAX_BLOCK_SCORES // (start + length), 1))
        for first in range(0, length, block):
            queries = min(block, length - first)
            yield Piece(sequence, offset + first, start + first, queries)


def _grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
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


def _key_group(batch: Batch, pieces: list[Piece], page_size: int, *, all_rows: bool) -> KeyGroup:
    device = batch.kv_index.device
    queries = max(piece.queries for piece in pieces)
    num_keys = max(piece.keys for piece in pieces)
    sequence, row, position, real = (
        torch.tensor(column, device=device).unsqueeze(1) for column in zip(*pieces, strict=True)
    )
    # A padding query repeats its piece's last one; its output is dropped.
    query = torch.minimum(torch.arange(queries, device=device), real - 1)  # [n, queries]
    key = torch.arange(num_keys, device=device)
    mask = key <= (position + query).unsqueeze(2)  # [n, queries, keys]
    num_pages = -(-num_keys // page_size)
    first_row = batch.page_table[sequence.squeeze(1), :num_pages] * page_size
    rows = (first_row.unsqueeze(2) + torch.arange(page_size, device=device)).flatten(1)
    rows = torch.where(key < position + real, rows[:, :num_keys], rows[:, :1])
    return KeyGroup(
        size=len(pieces),
        rows=None if all_rows else (row + query).flatten(),
        keys=rows.flatten(),
        mask=mask.unsqueeze(1),
    )


def _attend(query: Tensor, group: KeyGroup, cache: AttentionCache) -> Tensor:
    """Attention of one group.

    query [n * queries, heads, head_dim] -> the same shape. The heads that share a KV head become
    further queries of it, so that keys and values are never repeated.
    """
    key, value = (
        pages.flatten(0, 1).index_select(0, group.keys).view(group.size, -1, *pages.shape[2:])
        for pages in (cache.key, cache.value)
    )  # [n, keys, kv_heads, head_dim]
    kv_heads, head_dim = key.shape[2:]
    shared = query.shape[1] // kv_heads
    by_head = query.view(group.size, -1, kv_heads, shared, head_dim).transpose(1, 2)
    mask = group.mask
    if mask.shape[2] > 1:
        mask = mask.repeat_interleave(shared, dim=2)
    out = F.scaled_dot_product_attention(
        by_head.flatten(2, 3), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )  # [n, kv_heads, queries * shared, head_dim]
    return out.view(*by_head.shape).transpose(1, 2).reshape(query.shape)


class GatedAttention(nn.Module):
    """Grouped-query attention with normed, partly rotated heads and an output gate.

    Rows of the input projection: queries of all heads, their gates, keys, values.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.in_proj = Linear(hidden_size, 2 * (heads + kv_heads) * head_dim, dtype=dtype)
        self.query_norm = RMSNorm(head_dim, eps=eps)
        self.key_norm = RMSNorm(head_dim, eps=eps)
        self.out_proj = Linear(heads * head_dim, hidden_size, dtype=dtype)

    def forward(
        self, hidden: Tensor, rotation: Rotation, index: KeyIndex, cache: AttentionCache
    ) -> Tensor:
        projected = self.in_proj(hidden).view(len(hidden), -1, self.head_dim)
        query, gate, key, value = projected.split(
            (self.heads, self.heads, self.kv_heads, self.kv_heads), dim=1
        )
        query = rotation.apply(self.query_norm(query))
        key = rotation.apply(self.key_norm(key))
        cache.key.flatten(0, 1).index_copy_(0, index.written, key)
        cache.value.flatten(0, 1).index_copy_(0, index.written, value)
        outs = [
            _attend(query if group.rows is None else query[group.rows], group, cache)
            for group in index.groups
        ]
        attended = outs[0] if index.order is None else torch.cat(outs)[index.order]
        out: Tensor = self.out_proj((attended * gate.sigmoid()).flatten(1))
        return out
