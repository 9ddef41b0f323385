"""Routed experts on the CPU, computed by the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from kttrio import native
from kttrio.experts.routing import Routing


class HostExperts:
    """All experts of one layer in host memory.

    Takes and gives tensors on any device; the computation itself blocks on the CPU. `counts`, when
    set, is [num_experts] int64 and adds up how often each expert was chosen.
    """

    def __init__(self, layer: native.ExpertLayer, *, num_experts: int, dtype: torch.dtype) -> None:
        self.num_experts = num_experts
        self._layer = layer
        self._dtype = dtype
        self.counts: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self._layer.nbytes

    def close(self) -> None:
        self._layer.close()

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        ids, weights = routing.ids.cpu(), routing.weights.cpu()
        if self.counts is not None:
            self.counts += torch.bincount(ids[ids >= 0], minlength=len(self.counts))
        host = x.to("cpu", self._dtype).contiguous()
        out = torch.empty_like(host)
        self._layer.forward(host, ids, weights, out)
        return out.to(x.device, x.dtype)
