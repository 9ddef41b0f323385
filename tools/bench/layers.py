"""Expert layers with random weights, routings for them, and what they ought to compute."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import silu

from kttrio.experts.source import Matrices
from kttrio.native import ExpertLayer, Pool
from kttrio.weights.formats.base import find

NUM_DISTINCT = 2  # experts that are drawn; a layer's others repeat them, in memory of their own


@dataclass(frozen=True, slots=True)
class Shape:
    """One MoE layer of a published model; of large ones as many experts as memory has room for."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int

    def num_operations(self, num_tokens: int) -> float:
        """Multiplications and additions of one forward."""
        matrix = self.hidden_size * self.intermediate_size
        return 6.0 * matrix * self.top_k * num_tokens


SHAPES = {
    "qwen3-next": Shape(num_experts=512, top_k=10, hidden_size=2048, intermediate_size=512),
    "qwen3.5-397b": Shape(num_experts=128, top_k=10, hidden_size=4096, intermediate_size=1024),
    "deepseek-v3.2": Shape(num_experts=32, top_k=8, hidden_size=7168, intermediate_size=2048),
}


class Expert:
    """One expert of normal weights that keep the size of what they multiply, in a weight format."""

    def __init__(self, shape: Shape, weight_format: str, group_size: int) -> None:
        self.weight_format, self.group_size = weight_format, group_size
        self._format = find(weight_format)
        wide = (shape.intermediate_size, shape.hidden_size)
        self.matrices = Matrices(
            *(
                self._format.quantize(torch.randn(rows, columns) * columns**-0.5, group_size)
                for rows, columns in (wide, wide, wide[::-1])
            )
        )

    @cached_property
    def _floats(self) -> tuple[Tensor, ...]:
        dequantize = self._format.dequantize
        return tuple(dequantize(matrix, torch.float32) for matrix in self.matrices)

    def forward(self, x: Tensor) -> Tensor:
        """In fp32, with the weights that the library was given."""
        gate, up, down = self._floats
        return (silu(x @ gate.T) * (x @ up.T)) @ down.T


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each token wants."""

    ids: Tensor  # [tokens, top_k] int32
    weights: Tensor  # [tokens, top_k] float32
    num_touched: int
    """Distinct experts."""


def routing_of(ids: Tensor) -> Routing:
    weights = torch.rand(ids.shape) + 0.1
    weights /= weights.sum(1, keepdim=True)
    return Routing(ids.to(torch.int32).contiguous(), weights, len(ids.unique()))


def draw_routings(shape: Shape, num_tokens: int, count: int) -> list[Routing]:
    """Uniform. One token's experts are dealt from a shuffled deck, so that none of them comes back,
    and is found in a cache, before all others had their turn."""
    if num_tokens == 1:
        deck = _dealt(shape)
        return [routing_of(torch.tensor([next(deck)])) for _ in range(count)]
    draws = (torch.rand(num_tokens, shape.num_experts) for _ in range(count))
    return [routing_of(draw.topk(shape.top_k, dim=1).indices) for draw in draws]


def _dealt(shape: Shape) -> Iterator[list[int]]:
    deck: list[int] = []
    while True:
        if len(deck) < shape.top_k:
            deck = random.sample(range(shape.num_experts), shape.num_experts)
        yield [deck.pop() for _ in range(shape.top_k)]


class RotatingLayers:
    """Layers that forwards take in turn, of so many bytes that no cache helps."""

    def __init__(
        self,
        pool: Pool,
        shape: Shape,
        experts: Sequence[Expert],
        *,
        activation: str,
        max_tokens: int,
        least_bytes: float,
    ) -> None:
        self._shape, self._experts = shape, experts
        self.dtype = torch.float32 if activation == "float32" else torch.bfloat16
        self.layers: list[ExpertLayer] = []
        while not self.layers or self.num_bytes < least_bytes:
            self.layers.append(self._new_layer(pool, activation, max_tokens))
        self._turn = 0

    def _new_layer(self, pool: Pool, activation: str, max_tokens: int) -> ExpertLayer:
        expert = self._experts[0]
        layer = ExpertLayer(
            pool,
            num_experts=self._shape.num_experts,
            hidden_size=self._shape.hidden_size,
            intermediate_size=self._shape.intermediate_size,
            weight_format=expert.weight_format,
            group_size=expert.group_size,
            activation=activation,
            max_tokens=max_tokens,
            max_top_k=self._shape.top_k,
        )
        for i in range(self._shape.num_experts):
            self._experts[i % len(self._experts)].matrices.pack_into(layer, i)
        return layer

    @property
    def num_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def expert_bytes(self) -> float:
        return self.layers[0].nbytes / self._shape.num_experts

    def forward(self, x: Tensor, routing: Routing, out: Tensor) -> None:
        """The next layer's forward."""
        self._turn = (self._turn + 1) % len(self.layers)
        self.layers[self._turn].forward(x, routing.ids, routing.weights, out)

    def error(self, x: Tensor, routing: Routing) -> float:
        """Relative error of some rows of a forward, against fp32."""
        out = torch.empty_like(x)
        self.forward(x, routing, out)
        rows = sorted({0, len(x) // 2, len(x) - 1})
        wanted = self._reference(x[rows].float(), routing.ids[rows], routing.weights[rows])
        return float((out[rows].float() - wanted).norm() / wanted.norm())

    def _reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self._experts):
            rows, places = (ids % len(self._experts) == number).nonzero(as_tuple=True)
            if len(rows):
                out.index_add_(0, rows, expert.forward(x[rows]) * weights[rows, places, None])
        return out

    def close(self) -> None:
        for layer in self.layers:
            layer.close()
