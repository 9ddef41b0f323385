"""Dense matrices that stay in FP8, as they are stored: half the memory, half the reads.

A model is built with plain matrices; before it is filled some of them give their place away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from kttrio.layers.backend import Backend
from kttrio.layers.fp8_linear import Fp8Linear, Scheme
from kttrio.layers.linear import Linear
from kttrio.weights.loader import Part, Weight, stacks_blocks


def keep_fp8(
    model: nn.Module,
    weights: Iterable[Weight],
    is_fp8: Callable[[Part], bool],
    *,
    backend: Backend,
    scheme: Scheme,
) -> None:
    """Put an `Fp8Linear` in the place of each `Linear` whose parts are all stored in FP8 and can
    stay so. All others are dequantised when they are read: those that are rearranged, or whose
    parts do not end with a block, or that more than a product is made with."""
    for weight in weights:
        path = weight.target.removesuffix(".weight")
        if path == weight.target or not (stacks_blocks(weight) and all(map(is_fp8, weight.parts))):
            continue
        plain = model.get_submodule(path)
        if isinstance(plain, Linear):
            model.set_submodule(path, Fp8Linear(plain, backend=backend, scheme=scheme))
