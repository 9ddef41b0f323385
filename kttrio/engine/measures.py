"""What the engine measures of itself: how long things take, and how often. Plain numbers; who
shows them, and under which names, is not known here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from kttrio.plan import Chunk, StepPlan, StepResult

STEP_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
WAIT_BOUNDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
GAP_BOUNDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10)
DELIVERY_BOUNDS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.5)


class Histogram:
    """How many values were at most as large as each bound. Adding one takes less than 0.5 us."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` rise; what is above the last is counted, too."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        """Of the values between two bounds, not yet added up."""
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


@dataclass(slots=True)
class Measures:
    """Since the start; times in seconds."""

    queue: Histogram = field(default_factory=partial(Histogram, WAIT_BOUNDS))
    """From a request's arrival here to the first step that has it."""
    gaps: Histogram = field(default_factory=partial(Histogram, GAP_BOUNDS))
    """Between two steps that bring tokens to a sequence."""
    prefills: Histogram = field(default_factory=partial(Histogram, STEP_BOUNDS))
    """The runner's time for a step that computes prompts, maybe beside decodes."""
    decodes: Histogram = field(default_factory=partial(Histogram, STEP_BOUNDS))
    """And for one of decodes alone."""
    deliveries: Histogram = field(default_factory=partial(Histogram, DELIVERY_BOUNDS))
    """The event loop's time to take in a step, plan the next and hand out the tokens."""
    num_prompt_tokens: int = 0
    """Computed; those of a preempted sequence again."""

    def note_step(self, plan: StepPlan, result: StepResult) -> None:
        """A step that went well."""
        num_prompt = _num_prompt_tokens(plan.chunks)
        if plan.long is not None and result.long is not None:
            self.num_prompt_tokens += len(plan.long.token_ids)
        self.num_prompt_tokens += num_prompt
        has_prompts = num_prompt > 0 or plan.long is not None
        (self.prefills if has_prompts else self.decodes).add(result.seconds)


def _num_prompt_tokens(chunks: Sequence[Chunk]) -> int:
    """Known tokens in the chunks of prompts: a plan has those after the decodes."""
    num_tokens = 0
    for chunk in reversed(chunks):
        known = len(chunk.token_ids) - chunk.num_drafts
        if chunk.sample and known == 1 and chunk.start >= chunk.num_prompt_tokens:
            break
        num_tokens += known
    return num_tokens
