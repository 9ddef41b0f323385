"""What a layer of a decoder is made of, as its config describes it: a mixer and an MLP.

A block is a frozen record. It names the stored tensors it is read from, makes its module and
says what it remembers between steps; `decoder.py` puts blocks together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kttrio.experts.block import Experts
from kttrio.layers.backend import Backend
from kttrio.layers.cache import LayerCache, RecurrentCache
from kttrio.models.base import CacheShape, StepScratch
from kttrio.weights.loader import ExpertWeights, Weight


class Room(NamedTuple):
    """How much a cache must hold, and where."""

    num_pages: int
    page_size: int
    num_slots: int
    dtype: torch.dtype
    device: torch.device


class Mixer(Protocol):
    """What lets the tokens of a sequence meet. Its module is called as
    `module(x, step, cache)`: x and result [tokens, hidden]."""

    def weights(self, ours: str, theirs: str) -> Iterator[Weight]:
        """`ours` is the module's own prefix, `theirs` that of the stored layer; both end in '.'."""
        ...

    def build(self, dtype: torch.dtype) -> nn.Module: ...

    def cache_shape(self, dtype: torch.dtype) -> CacheShape:
        """Of one layer."""
        ...

    def scratch(self, dtype: torch.dtype, backend: Backend) -> StepScratch: ...

    def new_cache(self, room: Room) -> LayerCache:
        """Zeros."""
        ...


class Recurrent(Protocol):
    """The module of a mixer whose cache is a `RecurrentCache`."""

    def settle(self, lengths: Tensor, cache: RecurrentCache) -> None:
        """As `CausalLM.settle`."""
        ...


class Mlp(Protocol):
    """What treats each token alone. Its module is called as `module(x)`."""

    def weights(self, ours: str, theirs: str) -> Iterator[Weight]: ...

    def experts(self, theirs: str) -> ExpertWeights | None:
        """The routed experts of a stored layer; None for a dense one."""
        ...

    def build(self, dtype: torch.dtype, experts: Experts | None) -> nn.Module: ...


class LayerSpec(NamedTuple):
    """One layer: mixer and MLP, each with a norm before it and a residual around it."""

    mixer: Mixer
    mlp: Mlp
