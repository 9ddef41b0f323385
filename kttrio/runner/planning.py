"""From flags to a plan, the same way for a start and for its preview.

Nothing is loaded or allocated here; build.py does that by the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from kttrio.config import ConfigError, RunnerConfig
from kttrio.layers.backend import Backend
from kttrio.models import loading
from kttrio.runner.device import Machine
from kttrio.runner.fitting import choose_dtype, fit_pool, note_device
from kttrio.runner.graphs import GraphWish
from kttrio.runner.memory import MemoryPlan, NoRoom, divide_memory, plan_memory
from kttrio.runner.needs import Needs, format_bytes
from kttrio.runner.notes import note_plan
from kttrio.runner.portion import note_portion, read_portion
from kttrio.runner.recording import recorder_settings
from kttrio.runner.refusal import Variant, explain
from kttrio.weights.checkpoint import read_json

Measure = Callable[[RunnerConfig], loading.Estimate]

_WORTH_IT = 0.9  # of the experts' memory, that others would take


@dataclass(frozen=True, slots=True)
class Start:
    """What `kttrio serve` would do on a machine."""

    config: RunnerConfig
    """Without the threads and nodes that the machine lacks."""
    machine: Machine
    dtype: torch.dtype
    """Of everything but the experts."""
    needs: Needs
    plan: MemoryPlan
    """What would be done; where that is nothing, what was asked for."""
    refusal: str
    """Why it would not start, and what mends it; empty where it would."""

    @property
    def directory(self) -> Path:
        """The checkpoint's."""
        return self.config.model.model or Path()

    @property
    def backend(self) -> Backend:
        """Who computes attention: on a GPU Triton, unless the flag says otherwise."""
        return _backend(self.config, self.machine)

    @property
    def estimate(self) -> loading.Estimate:
        return self.needs.estimate


def plan_start(config: RunnerConfig, machine: Machine) -> Start:
    """Measure the checkpoint, or a bare config.json in its place, and divide the machine's memory.

    Says aloud what the flags ask for in vain. Raises CheckpointError and ConfigError for what
    cannot work, but for what is only too large.
    """
    _check_model(config.model.model)
    fitted = fit_pool(config.experts, num_cores=machine.num_cores, nodes=machine.nodes)
    config = replace(config, experts=fitted)
    raw = read_json(_config_file(config))
    dtype = choose_dtype(config.model.dtype, raw, fast_bfloat16=machine.fast_bfloat16)
    measure = partial(_estimate, dtype=dtype, backend=_backend(config, machine))
    estimate = measure(config)
    portion = read_portion(config.placement, machine.kind, estimate.grid, estimate.shape)
    shows_residents = config.placement.record_kt_gpu_expert_distribution and portion is not None
    recording = recorder_settings(config.recording, with_residents=shows_residents)
    note_device(config.device, machine.kind)
    graphs = None if portion is None else _graphs(config, machine)
    needs = Needs(estimate, config.engine, recording, portion, graphs)
    try:
        plan = plan_memory(needs, machine)
    except NoRoom as error:
        why = explain(error, needs, machine, _variants(config, needs, measure))
        return Start(config, machine, dtype, needs, divide_memory(needs, machine), why)
    holds_all = plan.num_device_experts == estimate.grid.total
    note_portion(config.placement, machine.kind, holds_all=holds_all)
    note_plan(plan, config.engine, made_for=estimate.shape.context_length)
    return Start(config, machine, dtype, needs, plan, refusal="")


def extras(config: RunnerConfig) -> loading.Extras:
    """What of the checkpoint is used beside its language model."""
    vision = not config.model.language_model_only
    return loading.Extras(vision=vision, num_drafts=config.engine.num_drafts)


def _check_model(path: Path | None) -> None:
    if path is None:
        raise ConfigError("--model names no checkpoint directory or config.json")
    if not path.exists():
        raise ConfigError(f"--model: there is no {path}; check the path")


def _config_file(config: RunnerConfig) -> Path:
    path = config.model.model or Path()
    return path if path.is_file() else path / "config.json"


def _backend(config: RunnerConfig, machine: Machine) -> Backend:
    wants_torch = config.device.attention_backend == "torch"
    return "triton" if machine.kind == "cuda" and not wants_torch else "torch"


def _graphs(config: RunnerConfig, machine: Machine) -> GraphWish | None:
    """Where kernels read as much of a page table as a sequence has. Steps with drafts are none that
    can be captured."""
    device = config.device
    if device.disable_cuda_graph or config.engine.num_drafts:
        return None
    if _backend(config, machine) != "triton":
        return None
    return GraphWish(device.cuda_graph_bs, device.cuda_graph_max_bs)


def _estimate(config: RunnerConfig, *, dtype: torch.dtype, backend: Backend) -> loading.Estimate:
    """Of a checkpoint; without safetensors files the config alone is believed."""
    path = config.model.model or Path()
    found, wanted = config.experts, extras(config)
    if next(path.glob("*.safetensors"), None) is not None:
        return loading.estimate(path, dtype=dtype, experts=found, extras=wanted, backend=backend)
    return loading.estimate_config(
        _config_file(config), dtype=dtype, experts=found, extras=wanted, backend=backend
    )


def _variants(config: RunnerConfig, needs: Needs, measure: Measure) -> Iterator[Variant]:
    """The same model with less of it."""
    if needs.estimate.image_token_bytes:
        blind = replace(config, model=replace(config.model, language_model_only=True))
        yield Variant("--language-model-only", replace(needs, estimate=measure(blind)))
    small = replace(config, experts=replace(config.experts, kt_method="int4", kt_group_size=None))
    try:
        estimate = measure(small)
    except ConfigError:  # they are coarse already
        return
    if estimate.expert_bytes < _WORTH_IT * needs.estimate.expert_bytes:
        flag = f"--kt-method int4 (experts {format_bytes(estimate.expert_bytes)})"
        yield Variant(flag, replace(needs, estimate=estimate))
