"""Multi-head latent attention over the paged cache, to all keys or to those an indexer chooses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kttrio.layers.cache import LatentCache
from kttrio.layers.indexer import Indexer, IndexerShape
from kttrio.layers.latent import LatentAttention, LatentShape
from kttrio.layers.linear import Linear, Matrix
from kttrio.layers.norm import RMSNorm
from kttrio.layers.rotary import Rope
from kttrio.layers.step import Step

LATENT_EPS = 1e-6  # of both latents' norms, whatever rms_norm_eps says: so in the published code


class MLA(nn.Module):
    """Rows of the input projection: queries (or the latent they are made from), the latent of keys
    and values, the key's rotated dimensions.

    `follows`: attends to the keys that the last layer with an indexer chose.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        shape: LatentShape,
        query_rank: int | None,
        rope: Rope,
        indexer: IndexerShape | None,
        follows: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.shape, self.rope, self.follows = shape, rope, follows
        queries = shape.heads * shape.query
        self.in_sizes = (query_rank or queries, shape.latent, shape.rope)
        self.in_proj = Linear(hidden_size, sum(self.in_sizes), dtype=dtype)
        self.query_norm = self.query_proj = None
        if query_rank is not None:
            self.query_norm = RMSNorm(query_rank, eps=LATENT_EPS)
            self.query_proj = Linear(query_rank, queries, dtype=dtype)
        self.latent_norm = RMSNorm(shape.latent, eps=LATENT_EPS)
        self.up = Matrix(shape.latent, shape.heads * (shape.nope + shape.value), dtype=dtype)
        self.out_proj = Linear(shape.heads * shape.value, hidden_size, dtype=dtype)
        self.indexer = None
        if indexer is not None:
            if query_rank is None:
                raise ValueError("an indexer asks with the queries' latent; there is none")
            self.indexer = Indexer(hidden_size, query_rank, shape=indexer, rope=rope, dtype=dtype)

    def forward(self, hidden: Tensor, step: Step, cache: LatentCache) -> Tensor:
        query, latent, key = self.in_proj(hidden).split(self.in_sizes, -1)
        if self.query_norm is not None:
            query = self.query_norm(query)
        self._keep(latent, key, step, cache)
        if self.indexer is not None:
            step.selections = self.indexer(hidden, query, step, cache)
        attended = self._attend(self._queries(query, step), step, cache)
        out: Tensor = self.out_proj(attended.flatten(1))
        return out

    def _keep(self, latent: Tensor, key: Tensor, step: Step, cache: LatentCache) -> None:
        """Write this step's latents."""
        key = step.rotation(self.rope).apply_interleaved(key.unsqueeze(1)).squeeze(1)
        kept = torch.cat((self.latent_norm(latent), key), -1)
        cache.kept.flatten(0, 1).index_copy_(0, step.batch.kv_index, kept)

    def _queries(self, query: Tensor, step: Step) -> Tensor:
        """[tokens, heads, nope + rope]"""
        if self.query_proj is not None:
            query = self.query_proj(query)
        query = query.view(len(query), self.shape.heads, self.shape.query)
        nope, rope = torch.split(query, [self.shape.nope, self.shape.rope], dim=-1)
        return torch.cat((nope, step.rotation(self.rope).apply_interleaved(rope)), -1)

    def _attend(self, query: Tensor, step: Step, cache: LatentCache) -> Tensor:
        """[tokens, heads, value]"""
        spans, kept = step.spans, cache.kept.flatten(0, 1)
        layer = LatentAttention(self.shape, self.scale, self.up.weight, step.gather, step.kernels)
        outs = [
            layer.attend(group.of(query), group, kept, chosen).flatten(0, 1)
            for group, chosen in zip(spans.groups, self._chosen(step), strict=True)
        ]
        return outs[0] if spans.order is None else torch.cat(outs)[spans.order]

    def _chosen(self, step: Step) -> list[Tensor | None]:
        if self.indexer is None and not self.follows:
            return [None] * len(step.spans.groups)
        if step.selections is None:
            raise ValueError("no layer before this one has an indexer")
        return step.selections

    @property
    def scale(self) -> float:
        """Of the softmax: YaRN's correction stands here, not in cos and sin."""
        correction = self.rope.yarn.softmax_scale if self.rope.yarn else 1.0
        return correction / math.sqrt(self.shape.query)
