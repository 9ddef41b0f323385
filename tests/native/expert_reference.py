"""Random MoE layers for the tests of the expert library, and what they must compute, in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from kttrio.native import ExpertLayer, Pool

BLOCK = 128


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix as the library takes it, and its value in fp64."""

    stored: torch.Tensor
    scale: torch.Tensor | None
    value: torch.Tensor


@dataclass(frozen=True, slots=True)
class Expert:
    gate: Matrix
    up: Matrix
    down: Matrix


def random_matrix(rows: int, columns: int, *, weight_format: str, rng: torch.Generator) -> Matrix:
    weights = torch.randn(rows, columns, generator=rng) * columns**-0.5
    if weight_format == "bf16":
        stored = weights.bfloat16()
        return Matrix(stored, None, stored.double())
    num_blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    scale = torch.rand(num_blocks, generator=rng) * 0.004 + 0.001
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    stored = (weights / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Matrix(stored, scale, stored.double() * wide.double())


def random_experts(
    num_experts: int, hidden: int, inter: int, *, weight_format: str, seed: int
) -> list[Expert]:
    rng = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Matrix:
        return random_matrix(rows, columns, weight_format=weight_format, rng=rng)

    return [
        Expert(matrix(inter, hidden), matrix(inter, hidden), matrix(hidden, inter))
        for _ in range(num_experts)
    ]


def set_expert(layer: ExpertLayer, index: int, expert: Expert) -> None:
    layer.set_expert(
        index,
        gate=expert.gate.stored,
        up=expert.up.stored,
        down=expert.down.stored,
        gate_scale=expert.gate.scale,
        up_scale=expert.up.scale,
        down_scale=expert.down.scale,
    )


def make_layer(
    pool: Pool,
    experts: list[Expert],
    *,
    activation: str,
    max_tokens: int = 70,
    max_top_k: int = 8,
) -> ExpertLayer:
    inter, hidden = experts[0].gate.stored.shape
    layer = ExpertLayer(
        pool,
        num_experts=len(experts),
        hidden_size=hidden,
        intermediate_size=inter,
        weight_format="bf16" if experts[0].gate.scale is None else "fp8",
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
