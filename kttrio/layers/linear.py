"""A matrix, perhaps with a bias, in one of the model's own dtypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Matrix(nn.Module):
    """A weight [out, in] that others multiply with; created uninitialised, filled by the loader."""

    def __init__(self, in_size: int, out_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype), requires_grad=False)


class Linear(Matrix):
    """x @ weight.T + bias, in the weight's dtype."""

    def __init__(
        self, in_size: int, out_size: int, *, dtype: torch.dtype, bias: bool = False
    ) -> None:
        super().__init__(in_size, out_size, dtype=dtype)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_size, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
