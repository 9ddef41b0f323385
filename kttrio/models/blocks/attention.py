"""Grouped-query attention: how it is stored, built and cached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kttrio.layers.attention import MAX_FOLDED, Attention, AttentionShape
from kttrio.layers.backend import Backend
from kttrio.layers.cache import AttentionCache, LayerCache
from kttrio.layers.keys import MAX_BLOCK_SCORES, QUERY_BLOCK
from kttrio.layers.norm import one_plus
from kttrio.layers.rotary import Rope
from kttrio.models.base import CacheShape, StepScratch
from kttrio.models.blocks.contract import Room
from kttrio.weights.checkpoint import CheckpointError
from kttrio.weights.fields import Fields
from kttrio.weights.loader import Part, Weight, stack_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec(AttentionShape):
    """`self_attn.`: where outputs are gated, q_proj alternates head by head between query and
    gate."""

    centred_norms: bool = False
    """Norms are stored as their distance from one."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise CheckpointError(
                "config.json: num_attention_heads / num_key_value_heads is not a whole number"
            )

    @classmethod
    def read(cls, fields: Fields, rope: Rope) -> AttentionSpec:
        """What all families name alike: no gate, no biases, norms head by head."""
        return cls(
            hidden_size=fields.integer("hidden_size"),
            heads=fields.integer("num_attention_heads"),
            kv_heads=fields.integer("num_key_value_heads"),
            head_dim=fields.integer("head_dim"),
            rope=rope,
            eps=fields.number("rms_norm_eps"),
        )

    def weights(self, ours: str, theirs: str) -> Iterator[Weight]:
        theirs = f"{theirs}self_attn."
        yield self._in_proj(ours, theirs, "weight", (self.hidden_size,))
        if self.biased:
            yield self._in_proj(ours, theirs, "bias", ())
        out = Part(f"{theirs}o_proj.weight", (self.hidden_size, self.heads * self.head_dim))
        yield Weight(f"{ours}out_proj.weight", (out,))
        if self.normed != "nothing":
            yield self._norm(f"{ours}query_norm", f"{theirs}q_norm", self.heads)
            yield self._norm(f"{ours}key_norm", f"{theirs}k_norm", self.kv_heads)

    def _in_proj(self, ours: str, theirs: str, kind: str, columns: tuple[int, ...]) -> Weight:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = {"q": 2 * queries if self.gated else queries, "k": keys, "v": keys}
        parts = (Part(f"{theirs}{name}_proj.{kind}", (n, *columns)) for name, n in rows.items())
        arrange = self._part_gates if self.gated else stack_rows
        return Weight(f"{ours}in_proj.{kind}", tuple(parts), arrange)

    def _part_gates(self, query_gate: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries of all heads, then their gates, keys, values."""
        by_head = query_gate.view(self.heads, 2, self.head_dim, -1)
        return torch.cat((by_head.transpose(0, 1).reshape(query_gate.shape), key, value))

    def _norm(self, ours: str, theirs: str, heads: int) -> Weight:
        part = Part(f"{theirs}.weight", (self.norm_size(heads),))
        return Weight(f"{ours}.weight", (part,), one_plus if self.centred_norms else stack_rows)

    def build(self, dtype: torch.dtype) -> nn.Module:
        return Attention(self, dtype=dtype)

    def cache_shape(self, dtype: torch.dtype) -> CacheShape:
        per_token = 2 * self.kv_heads * self.head_dim * dtype.itemsize
        return CacheShape(per_token, 0, by_pages=True)

    def scratch(self, dtype: torch.dtype, backend: Backend) -> StepScratch:
        """What is projected, and of the queries four copies, while they are normed and rotated in
        float32. Where torch computes attention: masks of the whole step, and some of them once
        more, repeated for heads, as bools and as numbers."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        projected = ((2 if self.gated else 1) * queries + 2 * keys) * dtype.itemsize
        each = projected + 4 * queries * torch.float32.itemsize
        if backend == "triton":
            return StepScratch(each)
        repeated = torch.bool.itemsize + dtype.itemsize
        return StepScratch(
            per_token=each,
            per_key=QUERY_BLOCK * (self.heads // self.kv_heads) * repeated,
            of_keys=min(MAX_FOLDED, MAX_BLOCK_SCORES * (self.heads // self.kv_heads)) * repeated,
            per_pair=torch.bool.itemsize,
        )

    def new_cache(self, room: Room) -> LayerCache:
        shape = (room.num_pages, room.page_size, self.kv_heads, self.head_dim)
        key, value = (torch.zeros(shape, dtype=room.dtype, device=room.device) for _ in "kv")
        return AttentionCache(key, value)
