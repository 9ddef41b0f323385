"""What a memory plan gives less of than was asked for, said aloud."""

from __future__ import annotations

import logging

from kttrio.config import EngineConfig
from kttrio.runner.memory import MemoryPlan
from kttrio.runner.needs import format_bytes

log = logging.getLogger(__name__)


def note_plan(plan: MemoryPlan, engine: EngineConfig, *, made_for: int) -> None:
    """Log what the plan gives less of than the flags ask for, or than the model was made for."""
    _note_drafts(engine)
    _note_reductions(engine, plan, context=min(engine.context_length or made_for, made_for))
    _note_context(engine.context_length, made_for, plan)


def _note_drafts(engine: EngineConfig) -> None:
    if engine.speculative_algorithm is None and engine.speculative_num_draft_tokens > 1:
        log.warning(
            "--speculative-num-draft-tokens %d has no effect without --speculative-algorithm MTP",
            engine.speculative_num_draft_tokens,
        )


def _note_reductions(engine: EngineConfig, plan: MemoryPlan, *, context: int) -> None:
    """Say it where the plan gives less than the flags ask for. `context`: of one sequence."""
    short = (
        f"no more fits into --mem-fraction-static {engine.mem_fraction_static} of "
        f"{format_bytes(plan.device_memory.available_bytes)}"
    )
    for name, asked, given in (
        ("--chunked-prefill-size", engine.chunked_prefill_size, plan.max_step_tokens),
        ("--max-running-requests", engine.max_running_requests, plan.num_slots),
    ):
        if given < asked:
            log.warning("%s %d is reduced to %d: %s", name, asked, given, short)
    total, usable = engine.max_total_tokens or 0, plan.num_slots * context
    if plan.num_tokens < total:
        why = short if plan.num_tokens < usable else f"{plan.num_slots} x {context} use no more"
        log.warning("--max-total-tokens %d is reduced to %d: %s", total, plan.num_tokens, why)


def _note_context(asked: int | None, made_for: int, plan: MemoryPlan) -> None:
    """Say it where sequences may not be as long as the model or the flag would let one think."""
    if asked is not None and asked > made_for:
        log.warning(
            "--context-length %d is more than the model was made for; it is %d", asked, made_for
        )
    if plan.context_length < min(asked or made_for, made_for):
        log.warning(
            "the model was made for %d tokens, but the KV cache holds %d: longer requests are "
            "refused or cut (--max-total-tokens, --max-running-requests, --mem-fraction-static)",
            made_for,
            plan.context_length,
        )
