"""Attention over page tables: what its kernels are given, and what they give.

Everything that a kernel must know it reads from tensors on the device, so that a step whose values
the host does not know can be captured. What stands behind a sequence's last key is never read.
Without kernels, attention goes over groups of gathered keys: `keys.py` and `spans.py`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from kttrio.layers.batch import Batch, sent
from kttrio.layers.cache import AttentionCache


class Tables(NamedTuple):
    """Single queries: each sees the keys of its sequence up to itself."""

    pages: Tensor  # [n, pages] int64
    positions: Tensor  # [n] int64
    page_size: int


class Chunks(NamedTuple):
    """The new tokens of sequences, laid end to end."""

    pages: Tensor  # [sequences, pages] int64
    starts: Tensor  # [sequences] int64, position of each one's first token
    offsets: Tensor  # [sequences + 1] int64, row of its first token, and the number of rows
    longest: int  # tokens of one sequence, at most
    page_size: int


class PageIndex(NamedTuple):
    """How a step's queries find their keys; built once and used by every layer."""

    decodes: Tables | None  # of the first rows
    chunks: Chunks | None  # of those behind them


class Latents(NamedTuple):
    """A layer's latents as keys and values of all heads."""

    rows: Tensor  # [rows of the cache, size + rope]
    size: int  # of the part of a latent that is also its value
    scale: float  # of the softmax


class Kernels(Protocol):
    """Queries and results are contiguous and of one dtype, that of the cache; sums are float32."""

    def decode(self, query: Tensor, cache: AttentionCache, tables: Tables) -> Tensor:
        """[n, heads, head_dim] -> the same"""
        ...

    def prefill(self, query: Tensor, cache: AttentionCache, chunks: Chunks) -> Tensor:
        """[tokens, heads, head_dim] -> the same; causal"""
        ...

    def latent(self, query: Tensor, latents: Latents, tables: Tables) -> Tensor:
        """[n, heads, size + rope] -> [n, heads, size]"""
        ...

    def sparse(self, query: Tensor, latents: Latents, rows: Tensor) -> Tensor:
        """The same over rows [n, keys] of the cache, int64; -1: none, and at least one is there."""
        ...


def index_pages(batch: Batch) -> PageIndex:
    """Tables for the sequences of one token, chunks for the others."""
    count, decodes = batch.num_decodes, None
    if count:
        decodes = Tables(batch.page_table[:count], batch.positions[:count], batch.page_size)
    return PageIndex(decodes, _chunks(batch) if count < len(batch.lengths) else None)


def _chunks(batch: Batch) -> Chunks:
    count, device = batch.num_decodes, batch.kv_index.device
    offsets = [offset - count for offset in batch.offsets[count:]]
    return Chunks(
        pages=batch.page_table[count:],
        starts=sent(batch.starts[count:], device),
        offsets=sent(offsets, device),
        longest=max(batch.lengths[count:]),
        page_size=batch.page_size,
    )
