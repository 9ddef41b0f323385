"""Rotary position embedding over the first dimensions of a head; the others pass unchanged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kttrio.weights.checkpoint import CheckpointError
from kttrio.weights.fields import Fields


class RopeFields(NamedTuple):
    theta: float
    partial: float
    """Share of a head's dimensions that rotate."""


def read_rope(config: Fields) -> RopeFields:
    """The rope parameters in either spelling: `rope_parameters`, or flat with `rope_scaling`.

    Never guessed: a wrong theta gives a model that seems to work.
    """
    nested, scaling = config.section("rope_parameters"), config.section("rope_scaling")
    for section in (nested, scaling):
        kind = section.raw.get("rope_type", section.raw.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{section.where}: rope type {kind!r} is not supported")
    values = (
        (nested if name in nested else config).number(name)
        for name in ("rope_theta", "partial_rotary_factor")
    )
    return RopeFields(*values)


class Rotation(NamedTuple):
    """Angles of a step's tokens, computed once and used by every layer; float32."""

    cos: Tensor  # [tokens, 1, rotary_dim / 2]
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rotate x [tokens, heads, head_dim]: dimension i pairs with i + rotary_dim / 2."""
        half = self.cos.shape[-1]
        first, second, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
        first, second = first.float(), second.float()
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat((*(part.to(x.dtype) for part in turned), rest), dim=-1)


class Rotary(nn.Module):
    """Angles position * theta ** (-2 i / rotary_dim)."""

    inv_freq: Tensor

    def __init__(self, rotary_dim: int, *, theta: float) -> None:
        super().__init__()
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
        self.register_buffer("inv_freq", theta**-exponents, persistent=False)

    def forward(self, positions: Tensor) -> Rotation:
        angles = (positions.float()[:, None] * self.inv_freq).unsqueeze(1)
        return Rotation(angles.cos(), angles.sin())
