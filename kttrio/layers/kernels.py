"""Finds the kernels of a backend. Triton is imported only where it is wanted: an installation for
CPUs has none."""

from __future__ import annotations

from kttrio.layers.backend import Backend
from kttrio.layers.paged import Kernels


def open_kernels(backend: Backend) -> Kernels | None:
    """None where torch computes attention. ImportError where Triton is not installed."""
    if backend == "torch":
        return None
    from kttrio.layers.triton import kernels

    return kernels
