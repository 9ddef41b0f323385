"""Gated DeltaNet: how it is stored, built and cached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kttrio.layers.backend import Backend
from kttrio.layers.cache import LayerCache, RecurrentCache
from kttrio.layers.deltanet import GatedDeltaNet
from kttrio.layers.runs import MAX_TOGETHER
from kttrio.models.base import CacheShape, StepScratch
from kttrio.models.blocks.contract import Room
from kttrio.weights.checkpoint import CheckpointError
from kttrio.weights.fields import Fields
from kttrio.weights.loader import Part, Weight, stack_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNetSpec:
    """`linear_attn.`"""

    hidden_size: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    eps: float
    flat: bool = False
    """Projections are stored apart (qkv, z, b, a), heads in order; else as two matrices whose rows
    go key head by key head."""

    def __post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise CheckpointError(
                "config.json: linear_num_value_heads / linear_num_key_heads is not a whole number"
            )
        if self.kernel < 2:
            raise CheckpointError("config.json: linear_conv_kernel_dim must be at least 2")

    @classmethod
    def read(cls, fields: Fields, *, flat: bool) -> DeltaNetSpec:
        return cls(
            hidden_size=fields.integer("hidden_size"),
            key_heads=fields.integer("linear_num_key_heads"),
            value_heads=fields.integer("linear_num_value_heads"),
            key_dim=fields.integer("linear_key_head_dim"),
            value_dim=fields.integer("linear_value_head_dim"),
            kernel=fields.integer("linear_conv_kernel_dim"),
            eps=fields.number("rms_norm_eps"),
            flat=flat,
        )

    @property
    def channels(self) -> int:
        """Inputs of the short convolution."""
        return 2 * self.key_heads * self.key_dim + self.values

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    def weights(self, ours: str, theirs: str) -> Iterator[Weight]:
        theirs = f"{theirs}linear_attn."
        yield self._in_proj(f"{ours}in_proj.weight", theirs)
        conv = Part(f"{theirs}conv1d.weight", (self.channels, 1, self.kernel))
        yield Weight(f"{ours}conv", (conv,), _time_first)
        yield Weight(f"{ours}a_log", (Part(f"{theirs}A_log", (self.value_heads,)),))
        yield Weight(f"{ours}dt_bias", (Part(f"{theirs}dt_bias", (self.value_heads,)),))
        yield Weight(f"{ours}norm.weight", (Part(f"{theirs}norm.weight", (self.value_dim,)),))
        out = Part(f"{theirs}out_proj.weight", (self.hidden_size, self.values))
        yield Weight(f"{ours}out_proj.weight", (out,))

    def _in_proj(self, ours: str, theirs: str) -> Weight:
        heads = self.value_heads
        rows = {"qkvz": self.channels + self.values, "ba": 2 * heads}
        if self.flat:
            rows = {"qkv": self.channels, "z": self.values, "b": heads, "a": heads}
        parts = tuple(
            Part(f"{theirs}in_proj_{kind}.weight", (size, self.hidden_size))
            for kind, size in rows.items()
        )
        return Weight(ours, parts, stack_rows if self.flat else self._part_key_heads)

    def _part_key_heads(self, qkvz: Tensor, ba: Tensor) -> Tensor:
        """Both matrices are stored key head by key head; here each kind's rows stand together."""
        wide = self.values // self.key_heads
        sizes = [self.key_dim, self.key_dim, wide, wide]
        kinds = torch.split(qkvz.view(self.key_heads, -1, qkvz.shape[1]), sizes, dim=1)
        gates = ba.view(self.key_heads, -1, ba.shape[1]).chunk(2, dim=1)
        return torch.cat([kind.flatten(0, 1) for kind in (*kinds, *gates)])

    def build(self, dtype: torch.dtype) -> nn.Module:
        return GatedDeltaNet(
            self.hidden_size,
            key_heads=self.key_heads,
            value_heads=self.value_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            kernel=self.kernel,
            eps=self.eps,
            dtype=dtype,
        )

    def cache_shape(self, dtype: torch.dtype) -> CacheShape:
        state = self.value_heads * self.key_dim * self.value_dim * torch.float32.itemsize
        history = self.channels * (self.kernel - 1) * dtype.itemsize
        fed = self.channels * dtype.itemsize + 2 * self.value_heads * torch.float32.itemsize
        return CacheShape(0, state + history, fed)

    def scratch(self, dtype: torch.dtype, backend: Backend) -> StepScratch:
        """What is projected and recalled, and the norm's copies of that; of some tokens at a time,
        what they are to the recurrence, and as much several times over while it computes."""
        projected = (self.channels + self.values + 2 * self.value_heads) * dtype.itemsize
        fed = self.value_heads * (2 * self.key_dim + self.value_dim) * torch.float32.itemsize
        return StepScratch(
            per_token=projected + 5 * self.values * torch.float32.itemsize,
            at_once=(6 if backend == "torch" else 3) * fed,
            num_at_once=MAX_TOGETHER,
        )

    def new_cache(self, room: Room) -> LayerCache:
        history = (room.num_slots, self.kernel - 1, self.channels)
        state = (room.num_slots, self.value_heads, self.key_dim, self.value_dim)
        return RecurrentCache(
            torch.zeros(history, dtype=room.dtype, device=room.device),
            torch.zeros(state, device=room.device),
        )


def _time_first(conv: Tensor) -> Tensor:
    """Depthwise weights [channels, 1, kernel] -> [kernel, channels]"""
    return conv.squeeze(1).T
