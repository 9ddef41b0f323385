"""From settings to a running `Runner`: plan, load, allocate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from typing import cast

import torch
from torch import Tensor

from kttrio.config import ConfigError, RunnerConfig
from kttrio.device.base import Device
from kttrio.experts.bank import ExpertBank
from kttrio.experts.division import Division
from kttrio.layers.cache import LayerCache
from kttrio.models import base, loading
from kttrio.plan import Capacity
from kttrio.runner.device import find_machine, open_device
from kttrio.runner.facts import facts
from kttrio.runner.graphs import DecodeGraphs, GraphRoom
from kttrio.runner.hits import Hits
from kttrio.runner.machine import available_cores
from kttrio.runner.memory import MemoryPlan
from kttrio.runner.planning import Start, extras, plan_start
from kttrio.runner.portion import ALL_ON_HOST, choose_mask, recorded_counts
from kttrio.runner.recording import make_directory, new_recorder
from kttrio.runner.runner import Runner
from kttrio.runner.update import new_updater, open_state
from kttrio.weights.loader import Progress

_SMALL_MODEL_BYTES = 256 * 2**20


def build_runner(
    config: RunnerConfig,
    *,
    progress: Progress | None = None,
    on_plan: Callable[[MemoryPlan], None] | None = None,
) -> Runner:
    """Load `config.model.model` and make it ready to step.

    `on_plan` hears of the memory plan before the first weight is read, `progress` of bytes read
    and bytes in total. Raises ConfigError for what cannot work, CheckpointError for a checkpoint
    that is incomplete or wrong. Sets the number of threads torch uses in this process.
    """
    start = plan_start(config, find_machine(config.device.device))
    if start.refusal:
        raise ConfigError(start.refusal)
    if start.needs.recording is not None:
        make_directory(start.needs.recording.directory)
    _set_threads(start.estimate.dense_bytes)
    if on_plan is not None:
        on_plan(start.plan)
    return load_runner(start, progress)


def load_runner(
    start: Start,
    progress: Progress | None,
    *,
    load: Callable[..., base.CausalLM] = loading.load_model,
) -> Runner:
    """What the plan says, allocated and touched. `load` takes what `load_model` does."""
    plan, recorded, grid = start.plan, start.needs.recording, start.estimate.grid
    counts = recorded_counts(start.config.placement, grid) if start.needs.portion else None
    state = open_state(start.config, grid) if plan.num_spare_slots else None
    if counts is None and state is not None:
        counts = state.read()
    device = open_device(start.machine.kind) if start.needs.portion else None
    division = None if device is None else _divide(start, device, counts)
    with ExitStack() as undo:
        loaded = load(
            start.directory,
            dtype=start.dtype,
            experts=start.config.experts,
            max_step_tokens=plan.max_step_tokens,
            extras=extras(start.config),
            division=division,
            backend=start.backend,
            progress=progress,
        )
        undo.callback(loaded.close)
        spare = 1 if plan.graph_sizes else 0
        caches = loaded.new_caches(
            num_pages=plan.num_pages + spare,
            page_size=plan.page_size,
            num_slots=plan.num_slots + spare,
        )
        _touch(caches)
        # Before steps are captured: counting who is chosen must be part of them.
        updater = None if state is None else new_updater(start.config, loaded, counts, state)
        runner = Runner(
            loaded,
            caches,
            capacity=_capacity(plan, loaded.shape),
            device=start.machine.where,
            tower=loaded.vision,
            recorder=None if recorded is None else new_recorder(recorded, loaded),
            seam=device,
            graphs=None if device is None else _capture(loaded, caches, plan, device),
            updater=updater,
            hits=_count_hits(loaded),
            facts=facts(loaded, start, division),
        )
        undo.pop_all()
    return runner


def _divide(start: Start, device: Device, counts: Tensor | None) -> Division:
    """Who lives where. Experts in use that are known from before decide it unless a flag does."""
    plan, portion = start.plan, start.needs.portion or ALL_ON_HOST
    strategy = start.config.placement.kt_expert_placement_strategy
    if strategy is None and counts is not None and plan.num_spare_slots:
        strategy = "frequency"
    return Division(
        device=device,
        mask=choose_mask(strategy, start.estimate.grid, plan.num_device_experts, counts),
        num_ring_slots=plan.num_ring_slots,
        num_spare_slots=plan.num_spare_slots,
        prefill_threshold=plan.long_tokens,
        max_deferred=portion.max_deferred,
    )


def _capture(
    model: base.CausalLM, caches: list[LayerCache], plan: MemoryPlan, device: Device
) -> DecodeGraphs | None:
    """The caches have a page and a slot more than the plan: for padding."""
    if not plan.graph_sizes:
        return None
    room = GraphRoom(
        page_size=plan.page_size,
        max_pages=-(-plan.context_length // plan.page_size),
        spare_page=plan.num_pages,
        spare_slot=plan.num_slots,
    )
    try:
        return DecodeGraphs(model, caches, room=room, sizes=plan.graph_sizes, device=device)
    except RuntimeError as error:
        raise ConfigError(
            f"decode steps cannot be captured: {error}; --disable-cuda-graph runs them uncaptured"
        ) from error


def _count_hits(model: base.CausalLM) -> Hits | None:
    sides = cast("ExpertBank", model.bank).sides
    if sides is None:
        return None
    served = [side.served for side in sides.device_sides]
    return Hits(served, choices=model.top_k * len(model.moe_blocks()))


def _set_threads(dense_bytes: int) -> None:
    """Dense layers and experts take turns, so that each may use every core we are granted.

    A small model's products are over before a second thread has woken up: one is faster there.
    """
    granted = min(torch.get_num_threads(), available_cores())
    torch.set_num_threads(1 if dense_bytes < _SMALL_MODEL_BYTES else granted)


def _capacity(plan: MemoryPlan, shape: base.ModelShape) -> Capacity:
    return Capacity(
        num_slots=plan.num_slots,
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        context_length=plan.context_length,
        max_step_tokens=plan.max_step_tokens,
        vocab_size=shape.vocab_size,
        num_drafts=shape.num_drafts,
        long_tokens=plan.long_tokens,
        max_long_tokens=plan.max_long_tokens,
    )


def _touch(caches: list[LayerCache]) -> None:
    """Write every page once: memory that is not there is missed now, not during an answer."""
    for cache in caches:
        for field in fields(cache):
            value = getattr(cache, field.name)
            if isinstance(value, Tensor):
                value.zero_()
