"""From flags to what is wanted of the device for experts; how much fits, memory.py finds out.

Says aloud what has no effect, and refuses what cannot work, before anything is measured or read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import Tensor

from kttrio.config import AUTO, ConfigError, PlacementConfig
from kttrio.experts.placement import ExpertGrid, place, plan_budget
from kttrio.experts.recording import RecordingError, read_counts
from kttrio.models.base import ModelShape
from kttrio.runner.device import Kind
from kttrio.runner.fitting import name_idle

_RING = 64  # experts: enough for copies to run ahead of the products, and little memory
_LEAST_RING = 2  # one is filled while the other is read
_SPARES = 4  # slots for experts that are about to change sides
_LONG_TOKENS = 2048  # that take longer by the host's experts than by sending all of them once
_MAX_LONG_TOKENS = 32768  # beyond it, sending all experts once more costs little beside the rest
NO_DEVICE = "no GPU, every expert runs on the CPU; with --device cpu it stands in for one"


@dataclass(frozen=True, slots=True)
class Portion:
    """What is wanted on the device beside the dense layers."""

    num_experts: int | None
    """Over all layers; None: as many as there is room for."""
    is_ratio: bool = False
    """By --kt-gpu-experts-ratio."""
    num_ring_slots: int = 0
    is_ring_fixed: bool = False
    """By its flag, so that it is not made smaller."""
    num_spare_slots: int = 0
    """For experts that are about to change sides; 0: none ever does."""
    long_tokens: int = 0
    max_long_tokens: int = 0
    max_deferred: int = 0

    def alone(self) -> Portion:
        """Where no expert is left on the host that could come."""
        return replace(self, num_ring_slots=0, num_spare_slots=0, long_tokens=0, max_long_tokens=0)

    def smaller(self) -> Iterator[Portion]:
        """With half the ring, and half the room for long prompts, where there may be less."""
        if self.num_ring_slots > _LEAST_RING and not self.is_ring_fixed:
            yield replace(self, num_ring_slots=max(self.num_ring_slots // 2, _LEAST_RING))
        if self.max_long_tokens > self.long_tokens:
            half = max(self.max_long_tokens // 2, self.long_tokens)
            yield replace(self, max_long_tokens=half)


ALL_ON_HOST = Portion(num_experts=0)


def read_portion(
    config: PlacementConfig, kind: Kind, grid: ExpertGrid, shape: ModelShape
) -> Portion | None:
    """What the flags ask for of a device of this kind; None where they ask for none.

    A GPU has its experts and its ring by default, a CPU that stands in for one what it is told to.
    Raises ConfigError for flags that contradict each other or the model.
    """
    if kind == "none":
        return None
    num_experts = _num_experts(config, kind, grid)
    _check_update(config, num_experts, grid)
    long_tokens, num_ring = _prompts(config, kind, grid, num_experts)
    portion = Portion(
        num_experts=num_experts,
        num_ring_slots=num_ring,
        is_ring_fixed=config.kt_ring_experts is not None,
        num_spare_slots=_SPARES if config.kt_enable_dynamic_expert_update else 0,
        long_tokens=long_tokens,
        max_long_tokens=_longest(long_tokens, shape.context_length),
        max_deferred=_max_deferred(config, shape),
        is_ratio=config.kt_gpu_experts_ratio is not None,
    )
    asks = portion.num_experts != 0 or portion.num_ring_slots or portion.max_deferred
    return portion if kind == "cuda" or asks else None


def choose_mask(
    strategy: str | None, grid: ExpertGrid, num_experts: int, counts: Tensor | None
) -> Tensor:
    """Who starts on the device: [layers with experts, experts] bool, `num_experts` of them.

    counts [layers, experts], where experts in use are known; only frequency looks at them.
    """
    return place(strategy or "uniform", grid, budget=num_experts, counts=counts)[grid.layers]


def recorded_counts(config: PlacementConfig, grid: ExpertGrid) -> Tensor | None:
    """How often each expert was chosen, [layers, experts] int64, by --init-expert-location."""
    if config.init_expert_location in (None, "trivial"):
        return None
    path = Path(str(config.init_expert_location)).expanduser()
    try:
        counts = read_counts(path).sum(0)
    except (RecordingError, OSError) as error:
        raise ConfigError(f"--init-expert-location: {error}") from error
    if tuple(counts.shape) != grid.shape:
        theirs, ours = (" x ".join(map(str, shape)) for shape in (counts.shape, grid.shape))
        raise ConfigError(
            f"--init-expert-location {path} is of {theirs} experts, the model has {ours} (layers x "
            "experts); record it with this model"
        )
    return counts


def note_portion(config: PlacementConfig, kind: Kind, *, holds_all: bool) -> None:
    """Name the flags that have no effect, and why. `holds_all`: there is room on the device for
    all experts."""
    if kind == "none":
        name_idle(_given(config), NO_DEVICE)
        return
    if config.kt_gpu_experts_ratio is not None and config.kt_num_gpu_experts is not None:
        name_idle(["--kt-num-gpu-experts"], "--kt-gpu-experts-ratio goes first")
    if not config.kt_enable_dynamic_expert_update:
        _name_without_update(config)
    if holds_all:
        given = {
            "--kt-gpu-prefill-token-threshold": config.kt_gpu_prefill_token_threshold,
            "--kt-ring-experts": config.kt_ring_experts,
            "--kt-enable-dynamic-expert-update": config.kt_enable_dynamic_expert_update,
        }
        idle = [name for name, value in given.items() if value]
        name_idle(idle, "all experts stay on the device")


def _name_without_update(config: PlacementConfig) -> None:
    names = ("kt_dynamic_update_rule", "kt_expert_state")
    idle = [_flag(name) for name in names if getattr(config, name) is not None]
    name_idle(idle, "only with --kt-enable-dynamic-expert-update")
    is_trivial = config.init_expert_location in (None, "trivial")
    if not is_trivial and config.kt_expert_placement_strategy != "frequency":
        name_idle(
            ["--init-expert-location"], "only --kt-expert-placement-strategy frequency reads it"
        )


def _given(config: PlacementConfig) -> list[str]:
    """Flags that differ from their defaults."""
    return [
        _flag(item.name) for item in fields(config) if getattr(config, item.name) != item.default
    ]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _num_experts(config: PlacementConfig, kind: Kind, grid: ExpertGrid) -> int | None:
    number, ratio = config.kt_num_gpu_experts, config.kt_gpu_experts_ratio
    if ratio is None and (number == AUTO or (number is None and kind == "cuda")):
        return None
    return plan_budget(
        grid, num_gpu_experts=int(number or 0) if ratio is None else None, ratio=ratio
    )


def _check_update(config: PlacementConfig, num_experts: int | None, grid: ExpertGrid) -> None:
    if config.kt_enable_dynamic_expert_update and num_experts in (0, grid.total):
        have = "none" if num_experts == 0 else "all"
        raise ConfigError(
            f"--kt-enable-dynamic-expert-update: {have} of the {grid.total} experts are to be on "
            "the device, so that none could be exchanged; leave it away, or give another "
            "--kt-num-gpu-experts"
        )
    if config.kt_dynamic_update_rule == "last-chunk" and not config.kt_gpu_prefill_token_threshold:
        raise ConfigError(
            "--kt-dynamic-update-rule last-chunk looks at steps with long prompts; give "
            "--kt-gpu-prefill-token-threshold"
        )


def _prompts(
    config: PlacementConfig, kind: Kind, grid: ExpertGrid, num_experts: int | None
) -> tuple[int, int]:
    """From how many tokens on a prompt passes layer by layer, and how large the ring is."""
    threshold, num_ring = config.kt_gpu_prefill_token_threshold, config.kt_ring_experts
    if num_experts == grid.total:
        return 0, 0
    if threshold is None:
        threshold = _LONG_TOKENS if kind == "cuda" and num_ring != 0 else 0
    if num_ring is None:
        num_ring = min(_RING, grid.num_experts) if kind == "cuda" or threshold else 0
    _check_ring(num_ring, threshold)
    return threshold, num_ring


def _check_ring(num_ring: int, threshold: int) -> None:
    if threshold and not num_ring:
        raise ConfigError(
            f"--kt-gpu-prefill-token-threshold {threshold}: long prompts need room for experts on "
            "their way through the device; give --kt-ring-experts, or a threshold of 0"
        )
    if 0 < num_ring < _LEAST_RING:
        raise ConfigError(
            f"--kt-ring-experts {num_ring}: while one is read the next is written; give at least "
            f"{_LEAST_RING}, or 0"
        )


def _longest(long_tokens: int, context: int) -> int:
    return max(min(context, _MAX_LONG_TOKENS), long_tokens) if long_tokens else 0


def _max_deferred(config: PlacementConfig, shape: ModelShape) -> int:
    most = config.kt_max_deferred_experts_per_token or 0
    if most > shape.top_k:
        raise ConfigError(
            f"--kt-max-deferred-experts-per-token {most}: a token has {shape.top_k} experts"
        )
    return most
