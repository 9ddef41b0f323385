"""In which format a model's experts are held: what the checkpoint has, and what the flags ask for.

Decided for all layers before anything is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch

from kttrio import native
from kttrio.config import ConfigError, ExpertConfig
from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.formats import base as formats
from kttrio.weights.loader import ExpertWeights, check_parts
from kttrio.weights.quantize import Target

METHODS = {"AMXINT4": "int4", "AMXINT8": "int8"}
"""Names that other servers have for formats of ours."""

INTEGERS = ("int8", "int4")
SOURCES = ("bf16", "fp8")
"""What may be quantised: coarser weights would only lose again."""

Activation = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """For each layer: how its experts are stored, how they are held and what they multiply."""

    stored: tuple[Target, ...]
    held: tuple[Target, ...]
    activations: tuple[Activation, ...]

    @property
    def changed(self) -> tuple[int, ...]:
        """The layers whose experts are to be quantised."""
        pairs = enumerate(zip(self.stored, self.held, strict=True))
        return tuple(layer for layer, (stored, held) in pairs if stored != held)

    def nbytes(self, maps: Sequence[ExpertWeights]) -> int:
        """Memory of all experts as they are held."""
        sizes = zip(self.expert_bytes(maps), maps, strict=True)
        return sum(size * weights.num_experts for size, weights in sizes)

    def expert_bytes(self, maps: Sequence[ExpertWeights]) -> list[int]:
        """Of one expert as it is held, for each layer."""
        return [
            sum(formats.find(held.form).nbytes(part.shape, held.group) for part in weights.parts(0))
            for held, weights in zip(self.held, maps, strict=True)
        ]

    @property
    def format(self) -> str:
        """For people: 'int4 in groups of 64, made from fp8'."""
        held = "+".join(sorted({_describe(target) for target in self.held}))
        if not self.changed:
            return held
        sources = sorted({self.stored[layer].form for layer in self.changed})
        return f"{held}, made from {'+'.join(sources)}"

    @property
    def activation(self) -> str:
        """For people: 'int8'."""
        return "+".join(sorted(set(self.activations)))


def plan_experts(
    config: ExpertConfig,
    checkpoint: Checkpoint,
    maps: Sequence[ExpertWeights],
    *,
    dtype: torch.dtype,
) -> ExpertPlan:
    """Check every expert tensor's header and settle the formats; `dtype` is the model's.

    Raises CheckpointError for tensors that are wrong, ConfigError for flags that do not fit them.
    """
    stored = (check_experts(checkpoint, weights) for weights in maps)
    where = checkpoint.directory
    return _plan([_settle(config, *found, where=where) for found in stored], config, dtype)


def plan_declared(
    config: ExpertConfig, form: str, *, num_layers: int, dtype: torch.dtype, where: Path
) -> ExpertPlan:
    """The plan for experts of which only the format is known, as config.json declares it.

    `where` is named in the ConfigError for flags that do not fit.
    """
    pair = _settle(config, form, frozenset(formats.find(form).GROUPS), where=where)
    return _plan([pair] * num_layers, config, dtype)


def _plan(
    pairs: Sequence[tuple[Target, Target]], config: ExpertConfig, dtype: torch.dtype
) -> ExpertPlan:
    isa = native.best_isa(config.kt_isa)
    return ExpertPlan(
        stored=tuple(stored for stored, _ in pairs),
        held=tuple(held for _, held in pairs),
        activations=tuple(
            choose_activation(config.kt_activation, held.form, dtype, isa) for _, held in pairs
        ),
    )


def _settle(
    config: ExpertConfig, form: str, groups: frozenset[int], *, where: Path
) -> tuple[Target, Target]:
    """How a layer's experts are stored, and how they are to be held."""
    method = METHODS.get(config.kt_method, config.kt_method)
    chosen = form if method == "auto" else method
    _check_group(chosen, config.kt_group_size)
    if chosen == form:
        stored = Target(form, _stored_group(form, groups, config, where))
        return stored, stored
    _check_change(form, chosen, config.kt_method, where)
    usual, *_ = formats.find(chosen).GROUPS
    return Target(form, max(groups)), Target(chosen, config.kt_group_size or usual)


def check_experts(checkpoint: Checkpoint, weights: ExpertWeights) -> tuple[str, frozenset[int]]:
    """The format of a layer's experts, and the group sizes that all of its scales allow.

    Raises CheckpointError where tensors are wrong or formats mix.
    """
    check_parts(checkpoint, weights.all_parts())
    first = weights.gate.format(0)
    form = formats.stored_format(checkpoint, first)
    groups = frozenset(formats.find(form).GROUPS)
    for part in weights.all_parts():
        where = f"tensor {part.name!r} in {checkpoint.entry(part.name).file}"
        other = formats.stored_format(checkpoint, part.name)
        if other != form:
            raise CheckpointError(
                f"{where} is {other}, but {first!r} is {form}: a layer's experts share one format"
            )
        groups &= formats.find(form).group_sizes(checkpoint, part.name)
        if not groups:
            raise CheckpointError(
                f"{where} has scales for groups of another size than the layer's other experts"
            )
    return form, groups


def choose_activation(wanted: str, form: str, dtype: torch.dtype, isa: str) -> Activation:
    """What the products of a layer multiply; ConfigError where the flag does not fit the weights.

    `dtype` is the model's. Beside the error of int4 weights that of int8 activations does not show,
    and prompts take half the time. int8 weights keep bfloat16, unless the instruction set would
    have to multiply it as float32, at a fraction of the speed.
    """
    if wanted == "int8" and form not in INTEGERS:
        raise ConfigError(
            f"--kt-activation int8 is for int8 and int4 weights, but the experts are {form}; take "
            "bfloat16, or quantise them with --kt-method int8"
        )
    if wanted != "auto":
        return cast("Activation", wanted)
    if dtype is torch.float32:
        return "float32"
    if form == "int4" or (form == "int8" and isa not in native.BFLOAT16_ISAS):
        return "int8"
    return "bfloat16"


def _describe(target: Target) -> str:
    return f"{target.form} in groups of {target.group}" if target.form in INTEGERS else target.form


def _check_group(form: str, group: int | None) -> None:
    if group is not None and form not in INTEGERS:
        raise ConfigError(
            f"--kt-group-size {group}: {form} weights are not scaled in groups; leave the flag "
            "away, or choose --kt-method int4 or int8"
        )


def _stored_group(form: str, groups: frozenset[int], config: ExpertConfig, where: Path) -> int:
    """What the flag says, where rows are so short that the scales leave it open."""
    wanted = config.kt_group_size
    if wanted is None:
        return max(groups)
    if wanted not in groups:
        raise ConfigError(
            f"--kt-group-size {wanted}: the experts in {where} are stored as {form} "
            f"in groups of {max(groups)}; leave the flag away"
        )
    return wanted


def _check_change(form: str, chosen: str, method: str, where: Path) -> None:
    """Only plain and fp8 weights are quantised, and nothing is blown up again."""
    if form in SOURCES and chosen != "bf16":
        return
    raise ConfigError(
        f"--kt-method {method}: the experts in {where} are {form}; take "
        f"--kt-method {form} (or auto), or name a checkpoint with {chosen} experts with "
        "--kt-weight-path"
    )
