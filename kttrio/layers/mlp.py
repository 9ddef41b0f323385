"""The dense gated MLP: shared experts and layers without experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kttrio.layers.linear import Linear


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x); gate and up are one matrix, gate rows first."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, dtype=dtype)
        self.down = Linear(intermediate_size, hidden_size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out
