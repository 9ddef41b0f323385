"""Grouped-query attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kttrio.layers.cache import AttentionCache
from kttrio.layers.gather import Gather
from kttrio.layers.keys import KeyGroup
from kttrio.layers.linear import Linear
from kttrio.layers.norm import RMSNorm
from kttrio.layers.paged import Kernels
from kttrio.layers.rotary import Rope
from kttrio.layers.spans import blocks
from kttrio.layers.step import Step

MAX_FOLDED = 1 << 25  # of a mask that is repeated for heads
Normed = Literal["heads", "projection", "nothing"]


def _attended(query: Tensor, step: Step, cache: AttentionCache) -> Tensor:
    """[tokens, heads, head_dim] -> the same"""
    if step.kernels is None:
        return _by_groups(query, step, cache)
    return _by_pages(query, step, step.kernels, cache)


def _by_pages(query: Tensor, step: Step, kernels: Kernels, cache: AttentionCache) -> Tensor:
    (decodes, chunks), count = step.pages, step.batch.num_decodes
    outs = []
    if decodes is not None:
        outs.append(kernels.decode(query[:count], cache, decodes))
    if chunks is not None:
        outs.append(kernels.prefill(query[count:], cache, chunks))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _by_groups(query: Tensor, step: Step, cache: AttentionCache) -> Tensor:
    index = step.keys
    outs = [
        _attend(query if group.rows is None else query[group.rows], group, cache, step.gather)
        for group in index.groups
    ]
    return outs[0] if index.order is None else torch.cat(outs)[index.order]


def _attend(query: Tensor, group: KeyGroup, cache: AttentionCache, gather: Gather) -> Tensor:
    """Attention of one group: query [n * queries, heads, head_dim] -> the same shape."""
    kv_heads, head_dim = cache.key.shape[2:]
    # Head by head: attention kernels read a head's keys as fast as memory gives them, but only
    # where they lie side by side.
    head = torch.arange(kv_heads, device=group.keys.device).unsqueeze(1)
    rows = group.keys.unsqueeze(1) * kv_heads + head
    key, value = (
        gather.rows(kind, pages.flatten(0, 2), rows)
        for kind, pages in (("keys", cache.key), ("values", cache.value))
    )  # [n, kv_heads, keys, head_dim]
    shared = query.shape[1] // kv_heads
    by_head = query.view(group.size, -1, kv_heads, shared, head_dim)
    outs = [
        _folded(by_head[:, block], key, value, group.mask[:, :, block])
        for block in blocks(0, by_head.shape[1], MAX_FOLDED // (group.keys.numel() * shared))
    ]
    return torch.cat(outs, dim=1).reshape(query.shape)


def _folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """query [n, queries, kv_heads, shared, head_dim] -> the same. The heads that share a KV head
    become further queries of it: it is read once for all of them, and repeated for none."""
    n, queries, kv_heads, shared, head_dim = query.shape
    if queries > 1:
        mask = mask.repeat_interleave(shared, dim=2)
    rows = query.transpose(1, 2).flatten(2, 3)  # [n, kv_heads, queries * shared, head_dim]
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask)
    return out.view(n, kv_heads, queries, shared, head_dim).transpose(1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Sizes, and where families differ."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    eps: float
    gated: bool = False
    """A sigmoid gates each output."""
    biased: bool = False
    """Queries, keys and values have biases."""
    normed: Normed = "heads"
    """What of queries and keys is normed before they turn: each head, all heads of a token as
    one vector, or nothing."""

    @property
    def kinds(self) -> tuple[int, ...]:
        """Heads of the input projection: queries, their gates, keys, values."""
        gates = (self.heads,) if self.gated else ()
        return (self.heads, *gates, self.kv_heads, self.kv_heads)

    def norm_size(self, heads: int) -> int:
        return self.head_dim if self.normed == "heads" else heads * self.head_dim


class Attention(nn.Module):
    """Grouped-query attention; rows of the input projection as in `AttentionShape.kinds`."""

    def __init__(self, shape: AttentionShape, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        rows = sum(shape.kinds) * shape.head_dim
        self.in_proj = Linear(shape.hidden_size, rows, dtype=dtype, bias=shape.biased)
        self.query_norm, self.key_norm = (self._norm(n) for n in (shape.heads, shape.kv_heads))
        self.out_proj = Linear(shape.heads * shape.head_dim, shape.hidden_size, dtype=dtype)

    def _norm(self, heads: int) -> RMSNorm | None:
        shape = self.shape
        return None if shape.normed == "nothing" else RMSNorm(shape.norm_size(heads), eps=shape.eps)

    def forward(self, hidden: Tensor, step: Step, cache: AttentionCache) -> Tensor:
        rotation, written = step.rotation(self.shape.rope), step.batch.kv_index
        projected = self.in_proj(hidden).view(len(hidden), -1, self.shape.head_dim)
        query, *gates, key, value = projected.split(self.shape.kinds, dim=1)
        query = rotation.apply(_normed(query, self.query_norm))
        key = rotation.apply(_normed(key, self.key_norm))
        cache.key.flatten(0, 1).index_copy_(0, written, key)
        cache.value.flatten(0, 1).index_copy_(0, written, value)
        attended = _attended(query, step, cache)
        for gate in gates:
            attended = attended * gate.sigmoid()
        out: Tensor = self.out_proj(attended.flatten(1))
        return out


def _normed(x: Tensor, norm: RMSNorm | None) -> Tensor:
    """x [tokens, heads, head_dim] -> the same; the norm's size says how many heads it takes."""
    if norm is None:
        return x
    out: Tensor = norm(x.reshape(len(x), -1, len(norm.weight)))
    return out.view(x.shape)
