"""Routed experts on the CPU, computed by the native library."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kttrio import native
from kttrio.experts.block import Beside
from kttrio.experts.carry import Carry
from kttrio.experts.routing import Routing

_PIECE = 2048  # tokens of a long prompt that are computed at once


class HostExperts:
    """All experts of one layer in host memory.

    Takes and gives tensors on any device; the computation itself blocks on the CPU.
    """

    def __init__(self, layer: native.ExpertLayer, *, dtype: torch.dtype) -> None:
        self._layer = layer
        self._dtype = dtype

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        beside: Beside | None = None,
        carry: Carry | None = None,
    ) -> Tensor:
        """As `Experts.forward`. Nothing is deferred: there is no device to do something else."""
        ids, weights = routing.ids.cpu(), routing.weights.cpu()
        host = x.to("cpu", self._dtype).contiguous()
        out = torch.empty_like(host)
        self._layer.forward(host, ids, weights, out)
        result = out.to(x.device, x.dtype)
        return result if beside is None else result.add_(beside())

    def stream(
        self, x: Tensor, routing: Routing, out: Tensor, carry: Carry | None = None
    ) -> Iterator[None]:
        parts = (torch.split(tensor, _PIECE) for tensor in (x, routing.ids, routing.weights, out))
        for tokens, ids, weights, rows in zip(*parts, strict=True):
            rows.add_(self.forward(tokens, Routing(ids, weights)))
            yield
