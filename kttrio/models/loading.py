"""A checkpoint as a model: opened, checked, measured, loaded.

Everything is checked before the first weight is read, so that measuring refuses what loading would.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kttrio.config import ConfigError, ExpertConfig
from kttrio.experts.bank import Bank, ExpertBank, ExpertLimits, Unloaded
from kttrio.experts.division import Division
from kttrio.experts.foreign import open_experts, warn_of_another_source
from kttrio.experts.formats import ExpertPlan, plan_declared, plan_experts
from kttrio.experts.placement import ExpertGrid
from kttrio.experts.scratch import ScratchShape, most_parts, scratch_shape
from kttrio.experts.selfcheck import Checked, check_experts
from kttrio.experts.source import open_source
from kttrio.layers.backend import Backend
from kttrio.layers.fp8_linear import best_scheme
from kttrio.models.base import (
    Blueprint,
    CacheShape,
    CausalLM,
    ModelShape,
    StepScratch,
    find_family,
    read_blueprint,
)
from kttrio.models.blocks.stored import keep_fp8
from kttrio.weights.census import Count, count, count_experts
from kttrio.weights.checkpoint import Checkpoint, CheckpointError, read_json
from kttrio.weights.declared import declared_format, declared_fp8
from kttrio.weights.formats.base import stored_format
from kttrio.weights.loader import (
    Countdown,
    ExpertWeights,
    Part,
    Progress,
    Weight,
    check_names,
    check_parts,
    fill,
    stored_bytes,
)

log = logging.getLogger(__name__)

NO_EXPERTS = ExpertGrid((), 0)
NO_SCRATCH = StepScratch()


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a checkpoint will need, known from its headers or even its config alone."""

    shape: ModelShape
    dense_bytes: int
    expert_bytes: int
    """In the format they are held in; the kernels' padding comes on top."""
    expert_format: str
    """For people, as is the next."""
    expert_activation: str
    expert_scratch: ScratchShape
    cache_shape: CacheShape
    counts: tuple[Count, ...] = ()
    """The weights by kind, the routed experts last."""
    num_routed_experts: int = 0
    """Of all layers together."""
    image_token_bytes: int = 0
    """What looking at an image takes for each of its tokens; 0: it takes no images."""
    step_scratch: StepScratch = NO_SCRATCH
    """Of the widest layer."""
    row_bytes: int = 0
    """Of a token between two layers."""
    grid: ExpertGrid = NO_EXPERTS
    """Of the experts that a device may have: not those of the layer for drafts."""
    slot_bytes: tuple[int, ...] = ()
    """Of one expert, for each layer that has some in the grid."""
    intermediate_size: int = 0
    """Of the widest routed expert."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What of a checkpoint is used beside its language model."""

    vision: bool = True
    """Where the model takes images."""
    num_drafts: int = 0
    """Of a sequence in a step, by the prediction layer, which must be there; 0: it is not read."""


WHOLE = Extras()


@dataclass(frozen=True, slots=True)
class _Source:
    """An opened checkpoint that fits its config and the flags."""

    blueprint: Blueprint
    dense: Checkpoint
    experts: Checkpoint  # the same one, or that of --kt-weight-path
    weights: list[Weight]
    expert_maps: list[ExpertWeights]
    plan: ExpertPlan

    def checked(self, dtype: torch.dtype) -> Checked:
        """What loaded experts are compared with; `dtype` is the model's."""
        top_k = self.blueprint.shape.top_k
        return Checked(self.experts, self.expert_maps, self.plan, top_k, dtype)


def stored_experts(directory: Path) -> tuple[ExpertWeights, ...]:
    """The routed experts that a checkpoint holds, those of its prediction layer included.

    Raises CheckpointError where it cannot be read.
    """
    blueprint = read_blueprint(directory)
    with Checkpoint(directory) as stored:
        if blueprint.draft_weight in stored.entries:
            blueprint = blueprint.drafting(1)
    return tuple(blueprint.expert_map())


@contextmanager
def _opened(
    directory: Path, config: ExpertConfig, dtype: torch.dtype, extras: Extras
) -> Iterator[_Source]:
    """Open and check everything, before a single weight is read."""
    blueprint = read_blueprint(directory)
    path = config.kt_weight_path
    with ExitStack() as files:
        dense = files.enter_context(Checkpoint(directory))
        blueprint = _with(extras, blueprint, dense.entries)
        weights, maps = list(blueprint.weight_map()), list(blueprint.expert_map())
        experts = files.enter_context(open_experts(path, directory, maps[0])) if path else dense
        parts = [part for weight in weights for part in weight.parts]
        check_parts(dense, parts)
        plan = _plan(config, experts, maps, dtype)
        known = {part.name for layer in maps for part in layer.all_parts()}
        check_names(dense, known | {part.name for part in parts}, blueprint.skipped)
        yield _Source(blueprint, dense, experts, weights, maps, plan)


def _with(extras: Extras, blueprint: Blueprint, stored: Container[str | None]) -> Blueprint:
    """The blueprint of what is wanted; ConfigError for drafts without the tensors they need."""
    if not extras.vision:
        blueprint = blueprint.without_vision()
    if not extras.num_drafts:
        return blueprint
    name = blueprint.draft_weight
    if name is None or name not in stored:
        why = "this model has no layer to draft with" if name is None else f"{name!r} is missing"
        raise ConfigError(
            f"--speculative-algorithm: {why}; leave the flag out, or take a checkpoint with "
            "its MTP tensors"
        )
    return blueprint.drafting(extras.num_drafts)


def _plan(
    config: ExpertConfig, experts: Checkpoint, maps: list[ExpertWeights], dtype: torch.dtype
) -> ExpertPlan:
    """The plan; what is wrong with the tensors is laid to the flag that names them."""
    try:
        return plan_experts(config, experts, maps, dtype=dtype)
    except CheckpointError as error:
        if config.kt_weight_path is None:
            raise
        raise ConfigError(f"--kt-weight-path {config.kt_weight_path}: {error}") from error


def estimate(
    directory: Path,
    *,
    dtype: torch.dtype,
    experts: ExpertConfig,
    extras: Extras = WHOLE,
    backend: Backend = "torch",
) -> Estimate:
    """Check the whole checkpoint and say what it will need, reading headers only.

    Raises CheckpointError and ConfigError as `load_model` would.
    """
    with _opened(directory, experts, dtype, extras) as source:
        bank = Unloaded(len(source.expert_maps))
        model = _outline_stored(source, bank, dtype, backend, torch.device("meta"))
        return _measure(source.blueprint, source.plan, experts, model)


def estimate_config(
    file: Path,
    *,
    dtype: torch.dtype,
    experts: ExpertConfig,
    extras: Extras = WHOLE,
    backend: Backend = "torch",
) -> Estimate:
    """What the model of a bare config.json will need, its weights being what that file says.

    Raises CheckpointError for a config that is wrong, ConfigError for flags that do not fit it.
    """
    if experts.kt_weight_path is not None:
        raise ConfigError(
            f"--kt-weight-path {experts.kt_weight_path}: there is only {file} to go with it; leave "
            "the flag away, --kt-method names the format"
        )
    raw = read_json(file)
    blueprint = find_family(raw.get("model_type")).parse(raw)
    blueprint = _with(extras, blueprint, {blueprint.draft_weight})
    num_layers = sum(1 for _ in blueprint.expert_map())
    form = declared_format(raw)
    plan = plan_declared(experts, form, num_layers=num_layers, dtype=dtype, where=file)
    model = _outline(blueprint, Unloaded(num_layers), dtype, backend)
    if backend == "triton":
        weights, is_fp8 = blueprint.weight_map(), declared_fp8(raw)
        keep_fp8(model, weights, is_fp8, backend=backend, scheme="w8a16")  # both take as much
    return _measure(blueprint, plan, experts, model)


def _outline(blueprint: Blueprint, bank: Bank, dtype: torch.dtype, backend: Backend) -> CausalLM:
    """The model without memory."""
    with torch.device("meta"):
        return blueprint.build(bank, dtype=dtype, backend=backend)


def _outline_stored(
    source: _Source, bank: Bank, dtype: torch.dtype, backend: Backend, device: torch.device
) -> CausalLM:
    """The same of a checkpoint."""

    def is_fp8(part: Part) -> bool:
        return stored_format(source.dense, part.name) == "fp8"

    model = _outline(source.blueprint, bank, dtype, backend)
    if backend == "triton":  # its kernels multiply with FP8, so that what is stored so stays so
        keep_fp8(model, source.weights, is_fp8, backend=backend, scheme=best_scheme(device))
    return model


def _measure(
    blueprint: Blueprint, plan: ExpertPlan, experts: ExpertConfig, model: CausalLM
) -> Estimate:
    maps = list(blueprint.expert_map())
    has_experts = tuple(number in model.moe_blocks() for number in range(model.num_layers))
    grid = ExpertGrid(has_experts, model.num_experts)
    held = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    routed = count_experts(maps, plan.nbytes(maps))
    return Estimate(
        shape=model.shape,
        dense_bytes=model.dense_bytes,
        expert_bytes=routed.nbytes,
        expert_format=plan.format,
        expert_activation=plan.activation,
        expert_scratch=scratch_shape(
            maps, plan.activations, top_k=model.top_k, num_parts=most_parts(experts)
        ),
        cache_shape=model.cache_shape(),
        step_scratch=model.step_scratch(),
        counts=(*count(blueprint.weight_map(), held), routed),
        num_routed_experts=sum(layer.num_experts for layer in maps),
        image_token_bytes=model.vision.bytes_per_token if model.vision else 0,
        row_bytes=model.row_bytes,
        grid=grid,
        slot_bytes=tuple(plan.expert_bytes(maps)[: len(grid.layers)]),
        intermediate_size=max(weights.intermediate_size for weights in maps),
    )


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype,
    experts: ExpertConfig,
    max_step_tokens: int,
    extras: Extras = WHOLE,
    division: Division | None = None,
    backend: Backend = "torch",
    progress: Progress | None = None,
) -> CausalLM:
    """Check and load a checkpoint, experts included; with drafts also its prediction layer.

    `dtype` float32 or bfloat16 is that of everything but the experts, which live on the host unless
    there is a division. `backend` computes attention; `progress` hears of bytes read. Raises
    CheckpointError before anything is read, ConfigError for flags that cannot work.
    """
    with _opened(directory, experts, dtype, extras) as source, ExitStack() as undo:
        warn_of_another_source(source.experts, source.dense, source.expert_maps)
        _tell_left_out(source)
        limits = ExpertLimits(max_step_tokens, source.blueprint.shape.top_k)
        bank = ExpertBank(experts, dtype=dtype, limits=limits, division=division)
        undo.callback(bank.close)
        countdown = _load_experts(bank, source, experts, progress)
        check_experts(bank, source.checked(dtype))
        device = torch.device("cpu") if division is None else division.device.where
        model = _outline_stored(source, bank, dtype, backend, device)
        model.to_empty(device=device)
        fill(model, source.dense, source.weights, countdown)
        undo.pop_all()
    return model.eval()


def _tell_left_out(source: _Source) -> None:
    for prefix in source.blueprint.skipped:
        entries = source.dense.entries.items()
        nbytes = sum(entry.nbytes for name, entry in entries if name.startswith(prefix))
        if nbytes:
            log.info("%s* is left out: %.1f MB that this model does not use", prefix, nbytes / 1e6)


def _load_experts(
    bank: ExpertBank, source: _Source, config: ExpertConfig, progress: Progress | None
) -> Countdown:
    """Fill the bank; the countdown goes on with the dense weights."""
    with open_source(
        source.plan,
        source.experts,
        source.expert_maps,
        cache_dir=config.kt_cache_dir,
        threads=bank.num_threads,
    ) as experts:
        dense_bytes = sum(stored_bytes(source.dense, weight.parts) for weight in source.weights)
        countdown = Countdown(experts.nbytes + dense_bytes, progress)
        bank.load(source.plan, source.expert_maps, experts, countdown)
    return countdown
