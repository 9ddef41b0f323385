"""Expert layers with random weights, routings for them, and what they ought to compute.

Weights are drawn in their format, not quantised: what is measured is the library, given weights.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import silu

from kttrio.native import ExpertLayer, Pool

NUM_DISTINCT = 4  # experts that are drawn; a layer's others repeat them, in memory of their own
BLOCK = 128  # weights along each side of an fp8 scale's square
SPREADS = {"bf16": 1.0, "fp8": 64.0, "int8": 32.0, "int4": 2.0}  # of the stored values
GROUPS = {"bf16": 0, "fp8": BLOCK, "int8": 128, "int4": 64}  # weights with one scale, by default


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


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix as a checkpoint has it."""

    weight_format: str
    data: Tensor  # [rows, columns]; two int4 to a byte
    scale: Tensor | None = None  # fp8: a square each; int8, int4: `group` weights of a row each
    group: int = 0

    def floats(self) -> Tensor:
        """The same weights in fp32."""
        values = self.data
        if self.weight_format == "int4":
            values = torch.stack((values & 15, values >> 4), dim=-1).flatten(1).float() - 8
        values = values.float()
        if self.scale is None:
            return values
        rows, columns = values.shape
        scale = self.scale.float()
        if self.weight_format == "fp8":
            scale = scale.repeat_interleave(BLOCK, 0)[:rows]
        return values * scale.repeat_interleave(self.group, 1)[:, :columns]


def draw_matrix(weight_format: str, rows: int, columns: int, group: int) -> Matrix:
    """Normal weights that keep the size of what they multiply; no two scales are the same."""
    spread = SPREADS[weight_format]
    values = torch.randn(rows, columns) * spread
    if weight_format == "bf16":
        return Matrix("bf16", (values * columns**-0.5).to(torch.bfloat16))
    num_groups = -(-columns // group)
    if weight_format == "fp8":
        scale = _scales(-(-rows // BLOCK), num_groups, columns**-0.5 / spread)
        return Matrix("fp8", values.to(torch.float8_e4m3fn), scale, group)
    scale = _scales(rows, num_groups, columns**-0.5 / spread).to(torch.bfloat16)
    if weight_format == "int8":
        return Matrix("int8", values.round_().clamp_(-127, 127).to(torch.int8), scale, group)
    codes = (values.round_().clamp_(-8, 7) + 8).to(torch.uint8)
    return Matrix("int4", codes[:, ::2] | codes[:, 1::2] << 4, scale, group)


def _scales(rows: int, columns: int, middle: float) -> Tensor:
    return (0.5 + torch.rand(rows, columns)) * middle


class Expert:
    """The three matrices of an expert."""

    def __init__(self, shape: Shape, weight_format: str, group: int) -> None:
        wide = (shape.intermediate_size, shape.hidden_size)
        self.gate = draw_matrix(weight_format, *wide, group)
        self.up = draw_matrix(weight_format, *wide, group)
        self.down = draw_matrix(weight_format, *reversed(wide), group)

    def tensors(self) -> dict[str, Tensor | None]:
        """By the names that ExpertLayer.set_expert has for them."""
        matrices = {"gate": self.gate, "up": self.up, "down": self.down}
        data = {name: matrix.data for name, matrix in matrices.items()}
        return {**data, **{f"{name}_scale": matrix.scale for name, matrix in matrices.items()}}

    @cached_property
    def floats(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate.floats(), self.up.floats(), self.down.floats()

    def forward(self, x: Tensor) -> Tensor:
        """In fp32."""
        gate, up, down = self.floats
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
        while self.num_bytes < least_bytes:
            layer = self._new_layer(pool, activation, max_tokens)
            self.layers.append(layer)
        self._turn = 0

    def _new_layer(self, pool: Pool, activation: str, max_tokens: int) -> ExpertLayer:
        matrix = self._experts[0].gate
        layer = ExpertLayer(
            pool,
            num_experts=self._shape.num_experts,
            hidden_size=self._shape.hidden_size,
            intermediate_size=self._shape.intermediate_size,
            weight_format=matrix.weight_format,
            group_size=matrix.group,
            activation=activation,
            max_tokens=max_tokens,
            max_top_k=self._shape.top_k,
        )
        for i in range(self._shape.num_experts):
            layer.set_expert(i, **self._experts[i % len(self._experts)].tensors())
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
