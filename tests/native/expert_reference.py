"""Random MoE layers for the tests of the expert library, and what they must compute, in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import silu

from kttrio.native import ExpertLayer, Pool

BLOCK = 128


class Kind(NamedTuple):
    """A weight format and its group size, 0 where it has none to choose."""

    weight_format: str
    group_size: int = 0

    def __str__(self) -> str:
        return f"{self.weight_format}-{self.group_size}" if self.group_size else self.weight_format


BF16, FP8 = Kind("bf16"), Kind("fp8")
GROUPED = (Kind("int8", 128), Kind("int8", 32), Kind("int4", 128), Kind("int4", 64))
KINDS = (BF16, FP8, *GROUPED, Kind("int8", 64), Kind("int4", 32))
# Of a layer's relative error: fp32 rounding; bfloat16's 8 bits; int8's 7 bits, twice.
TOLERANCE = {"float32": 2e-6, "bfloat16": 5e-3, "int8": 1.5e-2}
MODES = [
    (kind, activation)
    for kind in KINDS
    for activation in TOLERANCE
    if activation != "int8" or kind.group_size
]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix as the library takes it, and its value in fp64."""

    stored: torch.Tensor
    scale: torch.Tensor | None
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class Expert:
    kind: Kind
    gate: Matrix
    up: Matrix
    down: Matrix

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """By the names that set_expert and get_expert have for them."""
        matrices = {"gate": self.gate, "up": self.up, "down": self.down}
        scales = {f"{name}_scale": matrix.scale for name, matrix in matrices.items()}
        return {name: matrix.stored for name, matrix in matrices.items()} | scales


def random_matrix(rows: int, columns: int, *, kind: Kind, rng: torch.Generator) -> Matrix:
    if kind == BF16:
        stored = (torch.randn(rows, columns, generator=rng) * columns**-0.5).bfloat16()
        return Matrix(stored, None, stored.double())
    if kind == FP8:
        return _random_fp8(rows, columns, rng)
    return _random_grouped(rows, columns, kind, rng)


def _random_fp8(rows: int, columns: int, rng: torch.Generator) -> Matrix:
    num_blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    scale = torch.rand(num_blocks, generator=rng) * 0.004 + 0.001
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    weights = torch.randn(rows, columns, generator=rng) * columns**-0.5
    stored = (weights / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Matrix(stored, scale, stored.double() * wide.double())


def _random_grouped(rows: int, columns: int, kind: Kind, rng: torch.Generator) -> Matrix:
    """Every value of the format, the lowest as well."""
    low, high = (-8, 8) if kind.weight_format == "int4" else (-128, 128)
    values = torch.randint(low, high, (rows, columns), generator=rng)
    num_groups = -(-columns // kind.group_size)
    spread = torch.rand(rows, num_groups, generator=rng) + 0.5
    scale = (spread * columns**-0.5 / (0.58 * high)).bfloat16()
    wide = scale.double().repeat_interleave(kind.group_size, 1)[:, :columns]
    if kind.weight_format == "int4":
        codes = (values + 8).to(torch.uint8)
        return Matrix(codes[:, ::2] | codes[:, 1::2] << 4, scale, values * wide)
    return Matrix(values.to(torch.int8), scale, values * wide)


def random_experts(
    num_experts: int, hidden: int, inter: int, *, kind: Kind, seed: int
) -> list[Expert]:
    rng = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Matrix:
        return random_matrix(rows, columns, kind=kind, rng=rng)

    return [
        Expert(kind, matrix(inter, hidden), matrix(inter, hidden), matrix(hidden, inter))
        for _ in range(num_experts)
    ]


def set_expert(layer: ExpertLayer, index: int, expert: Expert) -> None:
    layer.set_expert(index, **expert.tensors())


def get_expert(layer: ExpertLayer, index: int, like: Expert) -> dict[str, torch.Tensor | None]:
    """What the layer holds, read into fresh tensors full of other bits."""
    tensors = {
        name: None if tensor is None else torch.full(tensor.shape, 7).to(tensor.dtype)
        for name, tensor in like.tensors().items()
    }
    layer.get_expert(index, **tensors)
    return tensors


def holds(layer: ExpertLayer, index: int, expert: Expert) -> bool:
    """Whether the layer gives back every bit of the expert."""
    found = get_expert(layer, index, expert)
    return all(
        wanted is None or torch.equal(found[name].view(torch.uint8), wanted.view(torch.uint8))
        for name, wanted in expert.tensors().items()
    )


def empty_layer(
    pool: Pool,
    like: Expert,
    *,
    num_experts: int,
    activation: str,
    max_tokens: int = 70,
    max_top_k: int = 8,
) -> ExpertLayer:
    inter, hidden = like.gate.value.shape
    return ExpertLayer(
        pool,
        num_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=inter,
        weight_format=like.kind.weight_format,
        group_size=like.kind.group_size,
        activation=activation,
        max_tokens=max_tokens,
        max_top_k=max_top_k,
    )


def make_layer(
    pool: Pool,
    experts: list[Expert],
    *,
    activation: str,
    max_tokens: int = 70,
    max_top_k: int = 8,
) -> ExpertLayer:
    layer = empty_layer(
        pool,
        experts[0],
        num_experts=len(experts),
        activation=activation,
        max_tokens=max_tokens,
        max_top_k=max_top_k,
    )
    for index, expert in enumerate(experts):
        set_expert(layer, index, expert)
    return layer


def random_routing(
    tokens: int, top_k: int, num_experts: int, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (some -1, some experts twice for a token) and weights, [tokens, top_k]."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, num_experts, (tokens, top_k), generator=rng, dtype=torch.int32)
    return ids, torch.rand(tokens, top_k, generator=rng)


def random_input(tokens: int, hidden: int, *, seed: int, dtype: torch.dtype) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, hidden, generator=rng).to(dtype)


def run(
    layer: ExpertLayer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    out = torch.full_like(x, float("nan"))
    layer.forward(x, ids, weights, out)
    return out


def expected(
    experts: list[Expert], x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The layer in fp64 on the weights it was given, [tokens, hidden]."""
    x = x.double()
    total = torch.zeros_like(x)
    for index, expert in enumerate(experts):
        token, k = (ids == index).nonzero(as_tuple=True)
        rows = x[token]
        hidden = silu(rows @ expert.gate.value.T) * (rows @ expert.up.value.T)
        part = weights[token, k].double()[:, None] * (hidden @ expert.down.value.T)
        total.index_add_(0, token, part)
    return total


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
