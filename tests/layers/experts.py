"""Random experts in stacks of every format, and what they give by definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kttrio.layers.grouped import Stacks
from kttrio.weights.formats import base as formats
from kttrio.weights.formats.base import Packed

# A format and how many weights share a scale.
KINDS = [("bf16", 0), ("fp8", 128), ("int8", 32), ("int8", 128), ("int4", 32), ("int4", 64)]


@dataclass
class Experts:
    """Stacks, and each slot's matrices in float32."""

    form: str
    stacks: Stacks
    plain: list[tuple[torch.Tensor, ...]]

    @classmethod
    def random(cls, kind: tuple[str, int], sizes: tuple[int, int, int]) -> Experts:
        """`sizes`: slots, hidden size, intermediate size."""
        name, group = kind
        slots, hidden, width = sizes
        form = formats.find(name)
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        made = [
            [form.quantize(torch.randn(shape) * shape[1] ** -0.5, group) for shape in shapes]
            for _ in range(slots)
        ]
        plain = [tuple(form.dequantize(p, torch.float32) for p in expert) for expert in made]
        return cls(name, Stacks(*(stack(matrices) for matrices in zip(*made, strict=True))), plain)

    def expected(self, x, ids, weights) -> torch.Tensor:
        """Token by token, in float32 but for the activation."""
        out = torch.zeros(x.shape, dtype=torch.float32)
        for t, k in ((ids >= 0).nonzero()).tolist():
            gate, up, down = self.plain[ids[t, k]]
            row = x[t].float()
            active = (F.silu(gate @ row) * (up @ row)).to(x.dtype).float()
            out[t] += weights[t, k] * (down @ active)
        return out


def stack(matrices: tuple[Packed, ...]) -> Packed:
    data, scales = zip(*matrices, strict=True)
    return Packed(torch.stack(data), None if scales[0] is None else torch.stack(scales))


def routing(tokens: int, slots: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct slots for each token, a third of them skipped."""
    ids = torch.stack([torch.randperm(slots)[:top_k] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, top_k)
    return ids.masked_fill_(torch.rand(tokens, top_k) < 0.33, -1), weights
