"""Norms. They compute in float32 and round once, at the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def one_plus(weight: Tensor) -> Tensor:
    """The factor of a zero-centred norm, whose checkpoint stores the distance from one."""
    return weight.float() + 1.0


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; for zero-centred norms load `one_plus`."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """The norm first, then times silu(gate); the result has the gate's dtype."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
        return normed.mul_(F.silu(gate.float())).to(gate.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / deviation * weight + bias over the last dimension."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        weight, bias = (torch.empty(size, dtype=torch.float32) for _ in range(2))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        return F.layer_norm(x.float(), shape, self.weight, self.bias, self.eps).to(x.dtype)
