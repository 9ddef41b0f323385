"""Which experts each token goes to, and how much of each it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Routing(NamedTuple):
    """One row per token; an id of -1 is skipped by whoever computes the experts."""

    ids: Tensor  # [tokens, top_k] int32
    weights: Tensor  # [tokens, top_k] float32

    def only(self, live: Tensor) -> Routing:
        """The same for tokens with `live` [tokens] bool; the others go nowhere."""
        return Routing(self.ids.masked_fill(~live.unsqueeze(1), -1), self.weights)


class Router(Protocol):
    """Scores to experts. Scores are float32: rounding them first would flip near ties."""

    @property
    def num_experts(self) -> int: ...

    @property
    def top_k(self) -> int: ...

    @property
    def has_bias(self) -> bool:
        """Whether a learned correction [experts] float32 takes part in the choice."""
        ...

    def route(self, scores: Tensor, bias: Tensor | None) -> Routing:
        """scores [tokens, experts] float32, as the gate gives them"""
        ...


@dataclass(frozen=True, slots=True)
class SoftmaxRouter:
    """The most probable experts; renormalised, their weights add up to one."""

    num_experts: int
    top_k: int
    renormalise: bool
    has_bias: bool = False

    def route(self, scores: Tensor, bias: Tensor | None) -> Routing:
        best, ids = scores.topk(self.top_k, dim=-1)
        if self.renormalise:  # the softmax over all, divided by its sum over the chosen
            return Routing(ids.to(torch.int32), best.softmax(-1))
        return Routing(ids.to(torch.int32), (best - scores.logsumexp(-1, keepdim=True)).exp())


@dataclass(frozen=True, slots=True)
class SigmoidRouter:
    """Sigmoid affinities; a learned bias takes part in the choice but not in the weights.

    DeepSeek-V3 (2024), section 2.1.2. With groups, only the experts of the best `kept_groups` are
    eligible; a group is as good as its two best experts together.
    """

    num_experts: int
    top_k: int
    renormalise: bool
    scale: float = 1.0
    num_groups: int = 1
    kept_groups: int = 1
    has_bias: bool = True

    def route(self, scores: Tensor, bias: Tensor | None) -> Routing:
        affinity = scores.sigmoid()
        choice = affinity if bias is None else affinity + bias
        if self.kept_groups < self.num_groups:
            choice = self._masked(choice)
        ids = choice.topk(self.top_k, dim=-1).indices
        weights = affinity.gather(-1, ids)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(ids.to(torch.int32), weights * self.scale)

    def _masked(self, choice: Tensor) -> Tensor:
        """-inf, not 0, outside the kept groups: a biased score may itself be negative."""
        groups = choice.view(len(choice), self.num_groups, -1)
        merit = groups.topk(2, dim=-1).values.sum(-1)
        kept = merit.topk(self.kept_groups, dim=-1).indices
        eligible = torch.zeros_like(merit, dtype=torch.bool).scatter_(-1, kept, True)
        return groups.masked_fill(~eligible.unsqueeze(-1), -torch.inf).flatten(1)
