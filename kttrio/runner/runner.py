"""The runner: a plan's tokens through the model, the next tokens out, one step at a time.

Owns the model, its caches and the sampler. What a sequence leaves behind in these is forgotten when
its slot begins anew, so that a step that failed spoils nothing but its own sequences.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kttrio.experts.recorder import Recorder
from kttrio.experts.update import Updater
from kttrio.layers.batch import Batch
from kttrio.layers.cache import LayerCache
from kttrio.plan import Capacity, ChunkResult, StepPlan, StepResult
from kttrio.runner.drafter import Drafter
from kttrio.runner.findings import Evaluator
from kttrio.runner.images import Eyes, Tower
from kttrio.runner.sampler import Sampler
from kttrio.runner.tensors import StepBuilder, StepTensors
from kttrio.runner.update import count_tokens


class StepModel(Protocol):
    """What a step needs of a model; `models.base.CausalLM` says what is promised."""

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def settle(self, lengths: Tensor, caches: list[LayerCache]) -> None: ...

    def draft(self, batch: Batch, hidden: Tensor, caches: list[LayerCache]) -> Tensor: ...

    def close(self) -> None: ...


class Runner:
    """A `StepRunner` in this process. Called from one thread at a time."""

    def __init__(
        self,
        model: StepModel,
        caches: list[LayerCache],
        *,
        capacity: Capacity,
        device: torch.device,
        tower: Tower | None = None,
        recorder: Recorder | None = None,
        updater: Updater | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        self.facts = dict(facts or {})
        """What was decided when it was built, for people to read: plain values."""
        self.recorder = recorder
        """Of the model's experts; None: nothing can be recorded."""
        self.updater = updater
        """Of the experts on the device; None: they stay there."""
        self._model = model
        self._caches = caches
        self._capacity = capacity
        self._builder = StepBuilder(page_size=capacity.page_size, device=device)
        self._eyes = Eyes(tower, device=device)
        sampler = Sampler(
            num_slots=capacity.num_slots, vocab_size=capacity.vocab_size, device=device
        )
        self._evaluator = Evaluator(model.logits, sampler)
        self._drafter = None
        if capacity.num_drafts:
            self._drafter = Drafter(
                model, self._builder, self._eyes, num_drafts=capacity.num_drafts
            )

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step; the results stand in the plan's order.

        A sequence whose logits are not finite has an error in its result. Raises
        FloatingPointError where that is all of them, ValueError for a chunk that contradicts
        itself, and whatever the model raises.
        """
        begun = time.perf_counter()
        if not plan.chunks:
            return StepResult((), time.perf_counter() - begun)
        with torch.inference_mode():
            step = self._eyes.look(self._builder.build(plan))
            with self._recorded(step.batch):
                hidden = self._model.forward(step.batch, self._caches)
                found = self._evaluator.evaluate(step, hidden)
            if step.batch.num_drafts:
                self._settle(step, found)
            if self._drafter is not None:
                found = self._drafter.draft(step, hidden, found, self._caches)
            if self.updater is not None:
                self.updater.between_steps(count_tokens(plan))
        results = [found[place] for place in np.argsort(step.order).tolist()]
        return StepResult(tuple(results), time.perf_counter() - begun)

    def close(self) -> None:
        """Free model and caches; no step may follow."""
        if self.updater is not None:
            self.updater.close()
        self._caches.clear()
        self._model.close()

    def _recorded(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext() if self.recorder is None else self.recorder.step(batch)

    def _settle(self, step: StepTensors, results: Sequence[ChunkResult]) -> None:
        """Let the caches know how many tokens stand of each sequence that had drafts."""
        lengths = [
            max(len(result.tokens), 1)
            for chunk, result in zip(step.chunks, results, strict=True)
            if chunk.num_drafts
        ]
        self._model.settle(torch.tensor(lengths, device=step.batch.slots.device), self._caches)
