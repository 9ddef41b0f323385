"""Routed experts in plain torch, one expert at a time: what the native ones are measured by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kttrio.experts.block import Beside
from kttrio.experts.carry import Carry
from kttrio.experts.routing import Routing
from kttrio.weights.checkpoint import Checkpoint
from kttrio.weights.formats import base as formats
from kttrio.weights.loader import ExpertWeights


class TorchExperts:
    """gate, up [experts, intermediate, hidden], down [experts, hidden, intermediate]."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self.gate, self.up, self.down = gate, up, down

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        beside: Beside | None = None,
        carry: Carry | None = None,
    ) -> Tensor:
        out = torch.zeros_like(x) if beside is None else beside().clone()
        for expert in range(len(self.gate)):
            token, place = (routing.ids == expert).nonzero(as_tuple=True)
            rows = x[token]
            inner = F.silu(rows @ self.gate[expert].T) * (rows @ self.up[expert].T)
            weight = routing.weights[token, place].to(x.dtype)
            out.index_add_(0, token, inner @ self.down[expert].T * weight[:, None])
        return out

    def stream(
        self, x: Tensor, routing: Routing, out: Tensor, carry: Carry | None = None
    ) -> Iterator[None]:
        out.add_(self.forward(x, routing))
        yield


class TorchBank:
    """Every layer's experts, dequantised."""

    isa, num_threads = "torch", 0

    def __init__(
        self, directory: Path, maps: list[ExpertWeights], dtype: torch.dtype = torch.float32
    ) -> None:
        with Checkpoint(directory) as checkpoint:
            self.layers = [self._layer(checkpoint, weights, dtype) for weights in maps]
        self.nbytes = sum(m.nbytes for e in self.layers for m in (e.gate, e.up, e.down))

    @staticmethod
    def _layer(checkpoint: Checkpoint, weights: ExpertWeights, dtype: torch.dtype) -> TorchExperts:
        stacks = ([], [], [])
        for expert in range(weights.num_experts):
            for stack, part in zip(stacks, weights.parts(expert), strict=True):
                form = formats.find(formats.stored_format(checkpoint, part.name))
                stack.append(form.dequantize(form.load(checkpoint, part.name), dtype))
        return TorchExperts(*map(torch.stack, stacks))

    def close(self) -> None:
        self.layers.clear()
