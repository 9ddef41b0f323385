"""Models of random weights that no disk has seen: all is drawn where it will live.

The same weights at every load, so that the same tokens choose the same experts however these are
divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kttrio.config import ExpertConfig
from kttrio.experts.bank import ExpertBank, ExpertLimits
from kttrio.experts.division import Division
from kttrio.experts.formats import ExpertPlan, plan_declared
from kttrio.experts.source import Matrices
from kttrio.layers.backend import Backend
from kttrio.layers.fp8_linear import best_scheme
from kttrio.models.base import CausalLM, find_family
from kttrio.models.blocks.stored import keep_fp8
from kttrio.models.loading import Extras
from kttrio.weights.checkpoint import read_json
from kttrio.weights.declared import declared_format, declared_fp8
from kttrio.weights.loader import Countdown, ExpertWeights, Progress
from tools.bench.layers import NUM_DISTINCT, Expert, Shape


class RandomLoader:
    """In the place of `load_model`; remembers the model for those who look into it."""

    def __init__(self) -> None:
        self.model: CausalLM | None = None

    def __call__(
        self,
        directory: Path,
        *,
        dtype: torch.dtype,
        experts: ExpertConfig,
        max_step_tokens: int,
        extras: Extras,
        division: Division | None = None,
        backend: Backend = "torch",
        progress: Progress | None = None,
    ) -> CausalLM:
        """The directory has a config.json and nothing else; drafts and images are left out."""
        raw = read_json(directory / "config.json")
        blueprint = find_family(raw.get("model_type")).parse(raw).without_vision()
        maps, form = list(blueprint.expert_map()), declared_format(raw)
        plan = plan_declared(experts, form, num_layers=len(maps), dtype=dtype, where=directory)
        limits = ExpertLimits(max_step_tokens, blueprint.shape.top_k)
        bank = ExpertBank(experts, dtype=dtype, limits=limits, division=division)
        source = RandomExperts(plan, maps, blueprint.shape.top_k)
        bank.load(plan, maps, source, Countdown(0, progress))
        where = torch.device("cpu") if division is None else division.device.where
        with where:
            model = blueprint.build(bank, dtype=dtype, backend=backend)
        if backend == "triton":
            weights, scheme = blueprint.weight_map(), best_scheme(where)
            keep_fp8(model, weights, declared_fp8(raw), backend=backend, scheme=scheme)
        draw_weights(model)
        self.model = model.eval()
        return self.model


class RandomExperts:
    """An `ExpertSource`. A layer's experts repeat a few, each in memory of its own."""

    nbytes = 0

    def __init__(self, plan: ExpertPlan, maps: Sequence[ExpertWeights], top_k: int) -> None:
        self._plan, self._maps, self._top_k = plan, maps, top_k

    def experts(self, layer: int, countdown: Countdown) -> Iterator[Matrices]:
        weights, held = self._maps[layer], self._plan.held[layer]
        shape = Shape(
            weights.num_experts, self._top_k, weights.hidden_size, weights.intermediate_size
        )
        torch.manual_seed(layer)
        drawn = [Expert(shape, held.form, held.group).matrices for _ in range(NUM_DISTINCT)]
        for number in range(weights.num_experts):
            yield drawn[number % NUM_DISTINCT]


def draw_weights(model: nn.Module) -> None:
    """Matrices keep the length of what they multiply, roughly; vectors and scales are ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_matrix = parameter.dim() > 1 and not name.endswith(".scale")
            parameter.copy_(_drawn(parameter) if is_matrix else torch.ones(()))


def _drawn(like: Tensor) -> Tensor:
    noise = torch.randn(like.shape, device=like.device, dtype=torch.bfloat16)
    return noise.mul_(like.shape[-1] ** -0.5)
