"""Multi-head latent attention: how it is stored, built and cached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kttrio.layers.backend import Backend
from kttrio.layers.cache import LatentCache
from kttrio.layers.indexer import IndexerShape
from kttrio.layers.latent import MAX_EXPANDED, MAX_LIFTED, LatentShape
from kttrio.layers.mla import MLA
from kttrio.layers.rotary import Rope
from kttrio.models.base import CacheShape, StepScratch
from kttrio.models.blocks.contract import Room
from kttrio.weights.checkpoint import CheckpointError
from kttrio.weights.loader import Part, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class MLASpec:
    """`self_attn.`: q_proj, or q_a_proj and q_b_proj where queries have a latent; keys and values
    always have one. `indexer.` where the layer chooses keys; `follows`: it takes those that the
    last layer with an indexer chose."""

    hidden_size: int
    shape: LatentShape
    query_rank: int | None
    rope: Rope
    indexer: IndexerShape | None = None
    follows: bool = False

    def __post_init__(self) -> None:
        if self.indexer is None:
            return
        if self.query_rank is None:
            raise CheckpointError("config.json: q_lora_rank is missing; the indexer asks with it")
        if self.indexer.head_dim < self.rope.dim:
            raise CheckpointError(
                f"config.json: index_head_dim {self.indexer.head_dim} is less than the "
                f"{self.rope.dim} dimensions of qk_rope_head_dim"
            )

    def weights(self, ours: str, theirs: str) -> Iterator[Weight]:
        theirs, shape = f"{theirs}self_attn.", self.shape
        latent = Part(f"{theirs}kv_a_proj_with_mqa.weight", (shape.kept, self.hidden_size))
        queries = shape.heads * shape.query
        if self.query_rank is None:
            first = Part(f"{theirs}q_proj.weight", (queries, self.hidden_size))
        else:
            first = Part(f"{theirs}q_a_proj.weight", (self.query_rank, self.hidden_size))
            yield _norm(f"{ours}query_norm", f"{theirs}q_a_layernorm", self.query_rank)
            second = Part(f"{theirs}q_b_proj.weight", (queries, self.query_rank))
            yield Weight(f"{ours}query_proj.weight", (second,))
        yield Weight(f"{ours}in_proj.weight", (first, latent))
        yield _norm(f"{ours}latent_norm", f"{theirs}kv_a_layernorm", shape.latent)
        up = Part(
            f"{theirs}kv_b_proj.weight", (shape.heads * (shape.nope + shape.value), shape.latent)
        )
        yield Weight(f"{ours}up.weight", (up,), self._keys_first)
        out = Part(f"{theirs}o_proj.weight", (self.hidden_size, shape.heads * shape.value))
        yield Weight(f"{ours}out_proj.weight", (out,))
        if self.indexer is not None and self.query_rank is not None:
            yield from self._indexer(f"{ours}indexer.", f"{theirs}indexer.", self.indexer)

    def _keys_first(self, up: Tensor) -> Tensor:
        """Stored head by head; here the keys of all heads stand before the values."""
        shape = self.shape
        by_head = up.view(shape.heads, -1, shape.latent)
        parts = torch.split(by_head, [shape.nope, shape.value], dim=1)
        return torch.cat([part.flatten(0, 1) for part in parts])

    def _indexer(self, ours: str, theirs: str, shape: IndexerShape) -> Iterator[Weight]:
        queries = (shape.heads * shape.head_dim, self.query_rank or 0)
        for mine, stored, size in (
            ("query_proj.weight", "wq_b.weight", queries),
            ("key_proj.weight", "wk.weight", (shape.head_dim, self.hidden_size)),
            ("key_norm.weight", "k_norm.weight", (shape.head_dim,)),
            ("key_norm.bias", "k_norm.bias", (shape.head_dim,)),
            ("head_weights.weight", "weights_proj.weight", (shape.heads, self.hidden_size)),
        ):
            yield Weight(f"{ours}{mine}", (Part(f"{theirs}{stored}", size),))

    def build(self, dtype: torch.dtype) -> MLA:
        return MLA(
            self.hidden_size,
            shape=self.shape,
            query_rank=self.query_rank,
            rope=self.rope,
            indexer=self.indexer,
            follows=self.follows,
            dtype=dtype,
        )

    def cache_shape(self, dtype: torch.dtype) -> CacheShape:
        if self.indexer is None:
            return CacheShape(self.shape.kept * dtype.itemsize, 0)
        return CacheShape(
            bytes_per_token=(self.shape.kept + self.indexer.head_dim) * dtype.itemsize,
            bytes_per_slot=0,
            bytes_chosen=self.indexer.top_k * torch.int32.itemsize,
        )

    def scratch(self, dtype: torch.dtype, backend: Backend) -> StepScratch:
        """Queries while they are made and rotated, and what they find; and of some at a time the
        keys and values of their heads, or they themselves as the latents take them."""
        shape = self.shape
        queries, values = shape.heads * shape.query, shape.heads * shape.value
        projected = (self.query_rank or queries) + shape.kept
        copies = 2.25  # of what is taken at a time, while one is made from the other
        return StepScratch(
            per_token=(projected + 3 * queries + 2 * values) * dtype.itemsize,
            per_key=int(copies * shape.heads * max(2 * shape.wide, shape.kept)) * dtype.itemsize,
            of_keys=int(copies * max(MAX_EXPANDED, MAX_LIFTED)) * dtype.itemsize,
        )

    def new_cache(self, room: Room) -> LatentCache:
        def pages(size: int) -> Tensor:
            shape = (room.num_pages, room.page_size, size)
            return torch.zeros(shape, dtype=room.dtype, device=room.device)

        index_key = pages(self.indexer.head_dim) if self.indexer else None
        return LatentCache(pages(self.shape.kept), index_key)


def _norm(ours: str, theirs: str, size: int) -> Weight:
    return Weight(f"{ours}.weight", (Part(f"{theirs}.weight", (size,)),))
