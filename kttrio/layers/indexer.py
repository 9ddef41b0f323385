"""The lightning indexer of DeepSeek Sparse Attention: which keys each query attends to.

DeepSeek-V3.2 (2025), section 2.1. Its Hadamard rotation and FP8 rounding only make scoring cheaper
on their kernels: the rotation cancels in every dot product, so both are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kttrio.layers.cache import LatentCache
from kttrio.layers.linear import Linear
from kttrio.layers.rotary import Rope, Rotation
from kttrio.layers.spans import SpanGroup, blocks
from kttrio.layers.step import Step

MAX_HEAD_SCORES = 1 << 22  # float32 at a time: one for each query, head and key
KEY_BLOCK = 2048  # keys scored at a time: more of them would not stay in a CPU's cache
KEY_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerShape:
    heads: int
    head_dim: int
    top_k: int
    interleaved: bool
    """Whether dimension 2 i pairs with 2 i + 1 in the rope, not with i + rope / 2."""


class Indexer(nn.Module):
    """Scores every key for every query by a few small heads and keeps the best.

    Keys are written whatever the context: a short one's are scored once it has grown.
    """

    def __init__(
        self,
        hidden_size: int,
        query_rank: int,
        *,
        shape: IndexerShape,
        rope: Rope,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.shape, self.rope = shape, rope
        self.query_proj = Linear(query_rank, shape.heads * shape.head_dim, dtype=dtype)
        self.key_proj = Linear(hidden_size, shape.head_dim, dtype=dtype)
        self.key_norm = nn.LayerNorm(shape.head_dim, eps=KEY_NORM_EPS, dtype=torch.float32)
        self.head_weights = Linear(hidden_size, shape.heads, dtype=torch.float32)
        self.requires_grad_(False)

    def forward(
        self, hidden: Tensor, query_latent: Tensor, step: Step, cache: LatentCache
    ) -> list[Tensor | None]:
        """hidden [tokens, hidden], query_latent [tokens, query_rank] -> what `Step.selections`
        holds: None for a group that sees no more keys than would be chosen."""
        if cache.index_key is None:
            raise ValueError("the cache of a layer with an indexer has room for its keys")
        rotation = step.rotation(self.rope)
        index_key = cache.index_key.flatten(0, 1)
        key = self.key_norm(self.key_proj(hidden).float()).to(index_key.dtype)
        key = self._turned(key.unsqueeze(1), rotation).squeeze(1)
        index_key.index_copy_(0, step.batch.kv_index, key)
        inputs = _QueryInputs(hidden, query_latent, rotation)
        return [
            self._chosen(
                group,
                inputs.of(group),
                step.gather.rows("index keys", index_key, group.keys),
            )
            if group.num_keys > self.shape.top_k
            else None
            for group in step.spans.groups
        ]

    @property
    def scale(self) -> float:
        """Of the sum over heads and of each dot product; it keeps scores small, no more."""
        return 1 / math.sqrt(self.shape.heads * self.shape.head_dim)

    def _chosen(self, group: SpanGroup, inputs: _QueryInputs, keys: Tensor) -> Tensor:
        """keys [n, keys, head_dim] -> [n, queries, top_k] int32"""
        top_k = self.shape.top_k
        chosen = group.keys.new_empty((*group.positions.shape, top_k), dtype=torch.int32)
        for block in blocks(0, group.num_queries, self._block_size(group)):
            seen = group.reach(block)
            if seen <= top_k:
                chosen[:, block] = torch.arange(top_k, device=chosen.device)
            else:
                scores = self._scores(inputs.at(block), keys[:, :seen])
                scores.masked_fill_(~group.visible(block), -torch.inf)
                chosen[:, block] = best(scores, top_k)
        return chosen

    def _block_size(self, group: SpanGroup) -> int:
        return MAX_HEAD_SCORES // (group.size * min(group.num_keys, KEY_BLOCK) * self.shape.heads)

    def _scores(self, inputs: _QueryInputs, keys: Tensor) -> Tensor:
        """keys [n, keys, head_dim] -> [n, queries, keys], in float32: rounding them would let
        chance decide what is seen."""
        size = inputs.latent.shape[:2]
        # Flat: of a block in three dimensions torch makes a batch, and copies the weights for it.
        query = self.query_proj(inputs.latent.flatten(0, 1))
        query = query.view(*size, self.shape.heads, self.shape.head_dim)
        query = self._turned(query, inputs.rotation)
        rows = query.float().flatten(1, 2)
        weights = self.head_weights(inputs.hidden.flatten(0, 1).float()) * self.scale
        weights = weights.view(*size, 1, self.shape.heads)
        scores = rows.new_empty(*query.shape[:2], keys.shape[1])
        for block in blocks(0, keys.shape[1], KEY_BLOCK):
            by_head = torch.matmul(rows, keys[:, block].float().transpose(1, 2)).relu_()
            by_head = by_head.view(*query.shape[:3], -1)  # [n, queries, heads, block]
            scores[:, :, block] = torch.matmul(weights, by_head).squeeze(2)
        return scores

    def _turned(self, x: Tensor, rotation: Rotation) -> Tensor:
        """The first dimensions rotated, where latent attention has the last ones so."""
        if not self.shape.interleaved:
            return rotation.apply(x)
        first, rest = torch.split(x, [self.rope.dim, x.shape[-1] - self.rope.dim], dim=-1)
        return torch.cat((rotation.apply_interleaved(first), rest), -1)


class _QueryInputs(NamedTuple):
    """What queries are made from: of all tokens, of a group [n, queries, ...], of a block of it."""

    hidden: Tensor
    latent: Tensor
    rotation: Rotation

    def of(self, group: SpanGroup) -> _QueryInputs:
        return self._each(group.of)

    def at(self, block: slice) -> _QueryInputs:
        return self._each(lambda x: x[:, block])

    def _each(self, cut: Callable[[Tensor], Tensor]) -> _QueryInputs:
        return _QueryInputs(cut(self.hidden), cut(self.latent), Rotation(*map(cut, self.rotation)))


def best(scores: Tensor, count: int) -> Tensor:
    """Where the `count` largest of the last dimension stand, int32 in ascending order.

    Among equals the first are taken, so that no choice depends on how a step was cut. NaN is
    chosen first: it must show in its own sequence, and fail no other. Overwrites scores.
    """
    scores.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    least = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, scores == least
    room = count - above.sum(-1, keepdim=True)
    chosen = above | equal & (equal.cumsum(-1, dtype=torch.int32) <= room)
    # Static: how many they are is known, and nobody waits to have them counted.
    places = torch.nonzero_static(chosen.flatten(), size=chosen.shape[:-1].numel() * count)
    return places.remainder_(scores.shape[-1]).view(*scores.shape[:-1], count).int()
