"""The MoE block of a layer: route, shared expert, routed experts, sum.

Where the routed experts live is not known here: anything with `forward(x, routing)` will do.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kttrio.experts.routing import Routing, softmax_top_k
from kttrio.layers.mlp import GatedMLP


class Experts(Protocol):
    """The routed experts of one layer."""

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Sum of the routed experts' outputs, weighted; x and result [tokens, hidden]."""
        ...


class MoEBlock(nn.Module):
    """Softmax routing beside a shared expert that a sigmoid gates.

    `gates` holds the router's rows and, last, the shared expert's gate, in float32.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        shared_size: int,
        num_experts: int,
        top_k: int,
        renormalise: bool,
        experts: Experts,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.top_k, self.renormalise = top_k, renormalise
        self.gates = nn.Parameter(
            torch.empty(num_experts + 1, hidden_size, dtype=torch.float32), requires_grad=False
        )
        self.shared = GatedMLP(hidden_size, shared_size, dtype=dtype)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x.float(), self.gates)
        routing = softmax_top_k(scores[:, :-1], self.top_k, renormalise=self.renormalise)
        shared = self.shared(x) * scores[:, -1:].sigmoid()
        return self.experts.forward(x, routing).add_(shared.to(x.dtype))
