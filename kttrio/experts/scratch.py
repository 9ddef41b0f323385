"""What forwards of the expert library need beside the weights: arithmetic for the memory plan.

Mirrors what the library reserves when layers are created (cpp/src/moe.cpp, scratch_need), for the
instruction set that needs most.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kttrio.config import ExpertConfig
from kttrio.experts.formats import Activation
from kttrio.weights.loader import ExpertWeights

MOST_PRODUCT_BYTES = 256 * 2**20  # of one part of the pool; with more tokens they are added at once
_FLOAT_BYTES = 4
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 2}  # int8: also its groups' scales and sums
_NODES = Path("/sys/devices/system/node")


class ScratchShape(NamedTuple):
    """Layers take turns, so that they share their scratch."""

    token_bytes: int
    """Rows as they come and sorted by expert, and what lies between an expert's matrices."""
    product_bytes: int
    """What a token's experts give, before it is summed up; for each part of the pool."""
    num_parts: int

    def nbytes(self, num_tokens: int) -> int:
        """Of forwards of so many tokens."""
        products = min(num_tokens * self.product_bytes, MOST_PRODUCT_BYTES)
        return num_tokens * self.token_bytes + self.num_parts * products


def scratch_shape(
    maps: Sequence[ExpertWeights],
    activations: Sequence[Activation],
    *,
    top_k: int,
    num_parts: int,
) -> ScratchShape:
    """Room for every layer."""
    pairs = list(zip(maps, activations, strict=True))
    return ScratchShape(
        max(_token_bytes(weights, mode, top_k, num_parts) for weights, mode in pairs),
        max(top_k * weights.hidden_size * _FLOAT_BYTES for weights in maps),
        num_parts,
    )


def most_parts(config: ExpertConfig, nodes: Path = _NODES) -> int:
    """The parts that the pool will have, or more where it may not use all of the machine."""
    named = len(config.kt_numa_nodes) or config.kt_threadpool_count
    return named or max(len(list(nodes.glob("node[0-9]*"))), 1)


def _token_bytes(weights: ExpertWeights, mode: Activation, top_k: int, num_parts: int) -> int:
    hidden, wide = weights.hidden_size, weights.intermediate_size
    element = _ELEMENT_BYTES[mode]
    rows = (1 + top_k) * hidden * element
    between = top_k * wide * (element + (_FLOAT_BYTES if mode == "int8" else 0))
    totals = num_parts * hidden * _FLOAT_BYTES if num_parts > 1 else 0
    return rows + between + totals
