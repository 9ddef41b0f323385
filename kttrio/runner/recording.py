"""From flags to what records the experts in use; the recording itself is experts/recorder.py's."""

from __future__ import annotations

import logging
import os
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from kttrio.config import ConfigError, RecordingConfig
from kttrio.experts.bank import ExpertBank
from kttrio.experts.recorder import RecordedShape, Recorder, RecorderSettings
from kttrio.experts.sides import Sides
from kttrio.models.base import CausalLM

log = logging.getLogger(__name__)

_NUM_STEPS = 1000
_DIRECTORY = Path("/tmp")


def recorder_settings(
    config: RecordingConfig, *, with_residents: bool = False
) -> RecorderSettings | None:
    """What the flags say; None where nothing is to be recorded. ConfigError where nothing would be
    kept. `with_residents`: --record-kt-gpu-expert-distribution is given."""
    mode = config.expert_distribution_recorder_mode
    num_steps = config.expert_distribution_recorder_buffer_size
    if mode is None:
        _name_idle(config)
        if with_residents:
            _warn_idle("--record-kt-gpu-expert-distribution")
        return None
    if num_steps == 0:
        raise ConfigError(
            "--expert-distribution-recorder-buffer-size 0 keeps nothing; give a number of steps, "
            "or -1 for all"
        )
    directory = (config.expert_distribution_recorder_dir or _DIRECTORY).absolute()
    if num_steps is None:
        num_steps = _NUM_STEPS
    kept = None if num_steps < 0 else num_steps
    return RecorderSettings(mode, kept, directory, with_residents)


def _name_idle(config: RecordingConfig) -> None:
    """Warn of what is given without a mode."""
    for item in fields(config):
        if (value := getattr(config, item.name)) is not None:
            _warn_idle(f"--{item.name.replace('_', '-')} {value}")


def _warn_idle(given: str) -> None:
    log.warning("%s has no effect without --expert-distribution-recorder-mode", given)


def new_recorder(settings: RecorderSettings, model: CausalLM) -> Recorder:
    """A recorder that listens to all layers of the model."""
    shape = RecordedShape(model.num_layers, model.num_experts, model.top_k)
    residents = partial(find_residents, model) if settings.with_residents else None
    return Recorder(settings, shape, model.moe_blocks(), residents)


def find_residents(model: CausalLM) -> Tensor:
    """Which experts are on the device, [layers, experts] bool; all of a layer without experts."""
    sides, layers = cast("Sides", cast("ExpertBank", model.bank).sides), list(model.moe_blocks())
    mask = torch.ones(model.num_layers, model.num_experts, dtype=torch.bool)
    for layer, residency in zip(layers, sides.residencies, strict=False):  # one more for drafts
        mask[layer] = residency.mask
    return mask


def describe(settings: RecorderSettings) -> str:
    """For the operator."""
    steps = f"the last {settings.num_steps} steps"
    if settings.num_steps is None:
        steps = "all steps, with no bound on their memory,"
    return f"{settings.mode} of {steps} between start and stop, dumped to {settings.directory}"


def make_directory(directory: Path) -> None:
    """At the start, because a dump that fails after hours of recording comes too late.

    ConfigError where files cannot be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--expert-distribution-recorder-dir {directory}: {error}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--expert-distribution-recorder-dir {directory}: we may not write there; name another"
        )
