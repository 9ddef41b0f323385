"""Attention over latents: keys and values of all heads are read from one short vector per token.

DeepSeek-V2 (2024), section 2.1. Three forms give the same: *expanded* makes every head's keys and
values, once per key; *absorbed* carries the queries over to the latents instead, once per query,
and pays more for each key; *sparse* is absorbed over the keys that an indexer chose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kttrio.layers.gather import Gather
from kttrio.layers.paged import Kernels, Latents, Tables
from kttrio.layers.spans import SpanGroup, blocks

MAX_EXPANDED = 1 << 26  # numbers of the keys and values that are expanded at a time
QUERY_BLOCK = 256  # queries that share a mask: more of them would see more of it False
MAX_MASK = 1 << 23  # of one such block
MAX_GATHERED = 1 << 24  # numbers of the chosen latents that are gathered at a time
MAX_LIFTED = 1 << 26  # numbers of the queries that are carried over to them at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """Sizes. A query or key head has `nope` dimensions and `rope` rotated ones; the key's rotated
    ones are shared by all heads, everything else of keys and values comes from the `latent`."""

    heads: int
    nope: int
    rope: int
    value: int
    latent: int

    @property
    def query(self) -> int:
        return self.nope + self.rope

    @property
    def kept(self) -> int:
        """Numbers per token in the cache."""
        return self.latent + self.rope

    @property
    def wide(self) -> int:
        """Of an expanded key or value head: attention kernels want both of one size."""
        return max(self.query, self.value)

    # Costs are multiplications per head.

    @property
    def lift(self) -> int:
        """From one latent to key and value; also of one query to the latents and back."""
        return self.latent * (self.nope + self.value)

    def expanded_cost(self, queries: int, keys: int) -> int:
        """Of the last queries of so many keys; on average they see all but half their own."""
        return keys * self.lift + queries * (keys - queries // 2) * 2 * self.wide

    def absorbed_cost(self, queries: int, keys: int) -> int:
        return queries * (self.lift + keys * 2 * self.kept)

    def num_expanded(self, group: SpanGroup, num_chosen: int | None) -> int:
        """How many of a group's first queries cost least expanded.

        All or none where no keys were chosen. Otherwise those that see so few keys (with
        DeepSeek's sizes 3 times as many as are chosen) that a mask over all is cheaper than each
        query's own latents, if they are many enough to pay for the expansion.
        """
        queries, keys = group.num_queries, group.num_keys
        alone = self.absorbed_cost(1, num_chosen or keys)
        if num_chosen is not None:
            queries = min(max(alone // (2 * self.wide) - group.latest, 0), queries)
            keys = min(group.latest + queries, keys)
        return queries if self.expanded_cost(queries, keys) < queries * alone else 0


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """The attention of one layer. `weight` [heads * (nope + value), latent] makes the keys of all
    heads of a latent, then their values; `scale` is that of the softmax; `gather` has the memory
    for copies of latents, of which `kernels` need none where they compute the absorbed form."""

    shape: LatentShape
    scale: float
    weight: Tensor
    gather: Gather
    kernels: Kernels | None = None

    # Both are contiguous: kernels copy batches of matrices that are not, in every step.

    @property
    def up_key(self) -> Tensor:
        """[heads, nope, latent]"""
        keys = self.weight[: self.shape.heads * self.shape.nope]
        return keys.view(self.shape.heads, -1, self.shape.latent)

    @property
    def up_value(self) -> Tensor:
        """[heads, value, latent]"""
        values = self.weight[self.shape.heads * self.shape.nope :]
        return values.view(self.shape.heads, -1, self.shape.latent)

    def attend(
        self, query: Tensor, group: SpanGroup, kept: Tensor, chosen: Tensor | None
    ) -> Tensor:
        """Causal attention of a group.

        query [n, queries, heads, nope + rope]; kept [rows of the cache, latent + rope]; chosen
        [n, queries, top_k] int32 positions, None for all keys. [n, queries, heads, value]
        """
        if self.kernels is not None and chosen is None and group.num_queries == 1:
            return self._by_pages(query, group, kept, self.kernels)
        count = self.shape.num_expanded(group, None if chosen is None else chosen.shape[2])
        out = query.new_empty(*query.shape[:3], self.shape.value)
        if count:
            self._expanded(query, group, kept, chosen, out[:, :count])
        if chosen is not None:
            self._sparse(query, group, kept, chosen, out[:, count:])
        elif not count:
            self._absorbed(query, group, kept, out)
        return out

    def _expanded(
        self, query: Tensor, group: SpanGroup, kept: Tensor, chosen: Tensor | None, out: Tensor
    ) -> None:
        """The first queries, as many as `out` has room for."""
        size, count = out.shape[:2]
        num_keys = group.reach(slice(0, count))
        latents = self._latents(kept, group.keys[:, :num_keys])
        a_head = size * num_keys * 2 * self.shape.wide
        for heads in blocks(0, self.shape.heads, MAX_EXPANDED // a_head):
            key, value = self._keys_and_values(latents, heads)
            for block in blocks(0, count, min(QUERY_BLOCK, MAX_MASK // (size * num_keys))):
                seen = group.reach(block)
                attended = F.scaled_dot_product_attention(
                    _widened(query[:, block, heads].transpose(1, 2), self.shape.wide),
                    key[:, :, :seen],
                    value[:, :, :seen],
                    attn_mask=_mask(group, block, chosen).unsqueeze(1),
                    scale=self.scale,
                )
                out[:, block, heads] = attended.transpose(1, 2)[..., : self.shape.value]
            del key, value  # before those of the next heads are made

    def _keys_and_values(self, latents: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        """latents [n, keys, latent + rope] -> keys and values of some heads, both
        [n, heads, keys, wide]."""
        shape = self.shape
        latent, rope = torch.split(latents, [shape.latent, shape.rope], dim=-1)
        latent = latent.contiguous()  # once, not for each of the two products
        nope, value = (
            F.linear(latent, up[heads].flatten(0, 1)).view(*latent.shape[:2], -1, up.shape[1])
            for up in (self.up_key, self.up_value)
        )
        shared = rope.unsqueeze(2).expand(-1, -1, nope.shape[2], -1)
        parts = torch.cat((nope, shared), -1), value
        key, value = (_widened(part, shape.wide).transpose(1, 2) for part in parts)
        return key, value

    def _absorbed(self, query: Tensor, group: SpanGroup, kept: Tensor, out: Tensor) -> None:
        latents = self._latents(kept, group.keys).unsqueeze(1)
        for block in blocks(0, group.num_queries, MAX_MASK // group.keys.numel()):
            seen = latents[:, :, : group.reach(block)]
            out[:, block] = self._over_latents(query[:, block], seen, group.visible(block))

    def _by_pages(self, query: Tensor, group: SpanGroup, kept: Tensor, kernels: Kernels) -> Tensor:
        """Of a group of single queries, absorbed."""
        tables = Tables(group.pages, group.positions.squeeze(1), group.page_size)
        lifted = self._lifted(query).squeeze(1)
        return self._lowered(kernels.latent(lifted, self._as_keys(kept), tables).unsqueeze(1))

    def _sparse(
        self, query: Tensor, group: SpanGroup, kept: Tensor, chosen: Tensor, out: Tensor
    ) -> None:
        """The last queries, as many as `out` has room for."""
        last = group.num_queries
        first = last - out.shape[1]
        for block in blocks(first, last, self._sparse_block(chosen.shape[2]) // group.size):
            places = chosen[:, block].long()
            rows = group.keys.gather(1, places.flatten(1)).view_as(places)
            seen = places <= group.positions[:, block].unsqueeze(2)
            at = slice(block.start - first, block.stop - first)
            out[:, at] = self._over_rows(query[:, block], kept, rows, seen)

    def _sparse_block(self, num_chosen: int) -> int:
        """Queries to take at once: what grows with them is what is gathered, or they themselves."""
        if self.kernels is None:
            return MAX_GATHERED // (num_chosen * self.shape.kept)
        return MAX_LIFTED // (self.shape.heads * self.shape.kept)

    def _over_rows(self, query: Tensor, kept: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
        """Each query over its own rows of the cache; rows and seen [n, queries, keys]"""
        if self.kernels is None:
            return self._over_latents(query, self._latents(kept, rows), seen)
        lifted, rows = self._lifted(query), rows.masked_fill(~seen, -1)
        attended = self.kernels.sparse(
            lifted.flatten(0, 1), self._as_keys(kept), rows.flatten(0, 1)
        )
        return self._lowered(attended.view(*seen.shape[:2], *attended.shape[1:]))

    def _over_latents(self, query: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
        """The absorbed form. latents [n, queries or 1, keys, latent + rope]: each query's own or
        one for all; mask [n, queries, keys].

        A head stands where attention kernels have a query, a query where they have a head: so all
        heads read the same latents, and these are nowhere repeated.
        """
        shape = self.shape
        keys = latents.expand(-1, query.shape[1], -1, -1)
        # The rope dimensions of the values are not needed, but kernels want them as wide as keys.
        attended = F.scaled_dot_product_attention(
            self._lifted(query),
            keys,
            keys,
            attn_mask=mask.unsqueeze(2),
            scale=self.scale,
        )
        return self._lowered(attended[..., : shape.latent])

    def _lifted(self, query: Tensor) -> Tensor:
        """Carried over to the latents: [n, queries, heads, latent + rope]"""
        nope, rope = torch.split(query, [self.shape.nope, self.shape.rope], dim=-1)
        return torch.cat((torch.einsum("nqhp,hpl->nqhl", nope, self.up_key), rope), -1)

    def _lowered(self, attended: Tensor) -> Tensor:
        """Weighted latents [n, queries, heads, latent] as values"""
        return torch.einsum("nqhl,hvl->nqhv", attended, self.up_value)

    def _as_keys(self, kept: Tensor) -> Latents:
        return Latents(kept, self.shape.latent, self.scale)

    def _latents(self, kept: Tensor, rows: Tensor) -> Tensor:
        return self.gather.rows("latents", kept, rows)


def _widened(x: Tensor, size: int) -> Tensor:
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def _mask(group: SpanGroup, block: slice, chosen: Tensor | None) -> Tensor:
    """[n, block, reach], True where the query sees the key"""
    visible = group.visible(block)
    if chosen is None:
        return visible
    # A query that sees fewer keys than are chosen has some among them that it does not see, even
    # beyond the reach; the causal mask takes them out again.
    mine = chosen[:, block].long().clamp(max=visible.shape[2] - 1)
    return torch.zeros_like(visible).scatter_(2, mine, True) & visible
