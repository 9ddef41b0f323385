"""What the runner tells those who keep the experts on the device up to date."""

from __future__ import annotations

from kttrio.experts.choice import StepTokens
from kttrio.plan import Chunk, StepPlan


def count_tokens(plan: StepPlan) -> StepTokens:
    """What a step consists of, with its long piece."""
    chunks = plan.chunks if plan.long is None else (*plan.chunks, plan.long)
    num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
    return StepTokens(num_tokens, sum(map(_num_prompt_tokens, chunks)))


def _num_prompt_tokens(chunk: Chunk) -> int:
    return max(0, min(len(chunk.token_ids), chunk.num_prompt_tokens - chunk.start))
