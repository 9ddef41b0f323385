"""From flags to what keeps the experts on the device those in use, and what it is told of steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from kttrio.config import ConfigError, RunnerConfig
from kttrio.experts.bank import ExpertBank
from kttrio.experts.choice import DecayedCounts, DecayedRule, LastChunkRule, Rule, StepTokens
from kttrio.experts.placement import ExpertGrid
from kttrio.experts.sides import Sides
from kttrio.experts.slots import ExpertSlots
from kttrio.experts.state import ExpertState, state_file
from kttrio.experts.swaps import Swapper, TwoSides
from kttrio.experts.update import Tally, Updater
from kttrio.models.base import CausalLM
from kttrio.plan import Chunk, StepPlan
from kttrio.weights.checkpoint import Checkpoint
from kttrio.weights.fingerprint import fingerprint


def open_state(config: RunnerConfig, grid: ExpertGrid) -> ExpertState | None:
    """Where dynamic update keeps what it has learnt; None where the flags do not ask for it.

    ConfigError for a file that could not be written at the end, when it would come too late.
    """
    if not config.placement.kt_enable_dynamic_expert_update:
        return None
    path = config.placement.kt_expert_state
    if path is None:
        with Checkpoint(config.model.model or Path()) as checkpoint:
            known = fingerprint(checkpoint, checkpoint.entries)
        path = state_file(config.experts.kt_cache_dir, known)
    else:
        _check_writable(path)
    return ExpertState(path, grid.layers, grid.shape)


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--kt-expert-state {path}: {error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--kt-expert-state {path}: no file can be written there; name another")


def new_updater(
    config: RunnerConfig, model: CausalLM, counts: Tensor | None, state: ExpertState
) -> Updater:
    """Listens to the layers of a loaded model whose experts are divided, and swaps these.

    counts [layers, experts], where experts in use are known from before.
    """
    bank = cast("ExpertBank", model.bank)
    sides = cast("Sides", bank.sides)
    layers = [TwoSides(*pair) for pair in zip(bank.host_layers, sides.residencies, strict=True)]
    blocks = model.moe_blocks()
    known = torch.zeros(model.num_layers, model.num_experts) if counts is None else counts
    swapper = Swapper(
        layers[: len(blocks)],
        cast("ExpertSlots", sides.slots),
        spares=sides.division.spare,
        device=sides.division.device,
    )
    tally = Tally(list(blocks.values()), sides.division.device)
    rule = _choose_rule(config, model, known[list(blocks)])
    return Updater(tally, rule, swapper, state)


def _choose_rule(config: RunnerConfig, model: CausalLM, counts: Tensor) -> Rule:
    """counts [layers with experts, experts], from before."""
    threshold = config.placement.kt_gpu_prefill_token_threshold
    if config.placement.kt_dynamic_update_rule == "last-chunk" and threshold:
        return LastChunkRule((len(counts), model.num_experts), threshold=threshold)
    return DecayedRule(DecayedCounts(counts, top_k=model.top_k))


def count_tokens(plan: StepPlan) -> StepTokens:
    """What a step consists of, with its long piece."""
    chunks = plan.chunks if plan.long is None else (*plan.chunks, plan.long)
    num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
    return StepTokens(num_tokens, sum(map(_num_prompt_tokens, chunks)))


def _num_prompt_tokens(chunk: Chunk) -> int:
    return max(0, min(len(chunk.token_ids), chunk.num_prompt_tokens - chunk.start))
