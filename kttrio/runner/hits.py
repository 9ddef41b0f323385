"""How much of what tokens choose the experts on the device serve."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kttrio.plan import Chunk, StepPlan


class Hits:
    """Choices that the device served, counted there, over all choices, counted here: those of
    tokens that a step was given, though it may fail or a long prompt be given up."""

    def __init__(self, served: Sequence[Tensor], *, choices: int) -> None:
        """`served` [1] int64 on the device, for each layer that serves some; they begin anew.
        `choices`: of a token, in all layers."""
        self._served, self._choices = [count.zero_() for count in served], choices
        self._num_tokens = 0
        self._long: Chunk | None = None

    def count(self, plan: StepPlan) -> None:
        """The tokens of a step that begins; a long prompt's with the first step that has it."""
        self._num_tokens += plan.num_tokens
        if plan.long is not None and plan.long is not self._long:
            self._num_tokens += len(plan.long.token_ids)
        self._long = plan.long

    def report(self) -> dict[str, object]:
        """The share of choices, once there were some. Waits for the device."""
        if not self._num_tokens:
            return {}
        share = sum(map(int, self._served)) / (self._num_tokens * self._choices)
        return {"served_by_device_experts": round(share, 4)}
