"""The kernels of attention, as `layers.paged.Kernels` wants them."""

from __future__ import annotations

from kttrio.layers.triton.attention_decode import decode
from kttrio.layers.triton.attention_prefill import prefill
from kttrio.layers.triton.dsa import sparse
from kttrio.layers.triton.mla import latent

__all__ = ["decode", "latent", "prefill", "sparse"]
