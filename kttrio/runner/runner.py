"""The runner: a plan's tokens through the model, the next tokens out, one step at a time.

Owns the model, its caches and the sampler. What a sequence leaves behind in these is forgotten when
its slot begins anew, so that a step that failed spoils nothing but its own sequences.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kttrio.device.base import Device
from kttrio.experts.recorder import Recorder
from kttrio.experts.update import Updater
from kttrio.layers.batch import Batch, sent
from kttrio.layers.cache import LayerCache
from kttrio.plan import Capacity, ChunkResult, StepPlan, StepResult
from kttrio.runner.drafter import Drafter
from kttrio.runner.findings import Evaluator
from kttrio.runner.graphs import DecodeGraphs
from kttrio.runner.hits import Hits
from kttrio.runner.images import Eyes, Tower
from kttrio.runner.passage import LongModel, Passages, StepParts
from kttrio.runner.sampler import Sampler
from kttrio.runner.tensors import StepBuilder, StepTensors
from kttrio.runner.update import count_tokens


class StepModel(LongModel, Protocol):
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
        seam: Device | None = None,
        graphs: DecodeGraphs | None = None,
        updater: Updater | None = None,
        hits: Hits | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        """`device` is where the model is; `seam` what can be done there beside computing, None
        where all experts are the host's; `graphs` of this model and these caches."""
        self.facts = dict(facts or {})
        """What was decided when it was built, for people to read: plain values."""
        self.recorder = recorder
        """Of the model's experts; None: nothing can be recorded."""
        self.updater = updater
        """Of the experts on the device; None: they stay there."""
        self._hits = hits
        self._model = model
        self._caches, self._seam = caches, seam
        self.graphs = graphs
        """None: all steps are plain."""
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
        self._passages = None
        if capacity.max_long_tokens:
            main = None if seam is None else seam.main
            parts = StepParts(self._builder, self._eyes, self._conclude, recorder, main)
            self._passages = Passages(model, caches, parts, capacity=capacity)

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
        with torch.inference_mode():
            if self._hits is not None:
                self._hits.count(plan)
            results = self._compute(plan) if plan.chunks else ()
            long = self._pass_on(plan, seconds=time.perf_counter() - begun)
            is_between_layers = plan.long is not None and long is None
            if self.updater is not None and not is_between_layers:
                self.updater.between_steps(count_tokens(plan))
        return StepResult(results, time.perf_counter() - begun, long)

    def count(self) -> dict[str, object]:
        """Plain values that change while it runs, for people. From any thread; may wait for the
        device."""
        counts: dict[str, object] = {} if self._hits is None else self._hits.report()
        if self.updater is not None:
            counts["expert_swaps"] = self.updater.num_swaps
        return counts

    def close(self) -> None:
        """Free model and caches; no step may follow."""
        self.graphs = None
        with ExitStack() as ends:  # the last comes first, and each, whatever goes wrong in another
            ends.callback(self._model.close)
            ends.callback(self._caches.clear)
            if self.updater is not None:
                ends.callback(self.updater.close)
            if self._passages is not None:
                ends.callback(self._passages.drop)

    def _compute(self, plan: StepPlan) -> tuple[ChunkResult, ...]:
        """The plan's chunks; where they fail the long prompt beside them has failed, too."""
        try:
            step = self._eyes.look(self._builder.build(plan))
            with self._recorded(step.batch):
                found = self._conclude(step, self._forward(step.batch))
        except Exception:
            self._drop()
            raise
        return tuple(found[place] for place in np.argsort(step.order).tolist())

    def _drop(self) -> None:
        """What a failed step or passage leaves under way; what else fails of it has been told
        enough."""
        if self._passages is not None:
            self._passages.drop()
        if self._seam is not None:
            with suppress(Exception):
                self._seam.synchronize()

    def _forward(self, batch: Batch) -> Tensor:
        """By a graph where there is one, and nobody wants to hear of the experts."""
        is_heard = self.recorder is not None and self.recorder.is_hearing
        hidden = None if self.graphs is None or is_heard else self.graphs.forward(batch)
        return self._model.forward(batch, self._caches) if hidden is None else hidden

    def _conclude(self, step: StepTensors, hidden: Tensor) -> list[ChunkResult]:
        """From the model's rows to results, in the order of the step; of a long prompt's piece,
        too."""
        found = self._evaluator.evaluate(step, hidden)
        if step.batch.num_drafts:
            self._settle(step, found)
        if self._drafter is not None:
            found = self._drafter.draft(step, hidden, found, self._caches)
        if self._seam is not None:
            self._seam.check_jobs()  # what the host's experts computed is in the results
        return found

    def _pass_on(self, plan: StepPlan, *, seconds: float) -> ChunkResult | None:
        if self._passages is None:
            return None
        result = self._passages.advance(plan.long, seconds=seconds if plan.chunks else 0.0)
        if result is not None and result.error is not None:
            self._drop()
        return result

    def _recorded(self, batch: Batch) -> AbstractContextManager[None]:
        return nullcontext() if self.recorder is None else self.recorder.step(batch)

    def _settle(self, step: StepTensors, results: Sequence[ChunkResult]) -> None:
        """Let the caches know how many tokens stand of each sequence that had drafts."""
        lengths = [
            max(len(result.tokens), 1)
            for chunk, result in zip(step.chunks, results, strict=True)
            if chunk.num_drafts
        ]
        self._model.settle(sent(lengths, step.batch.slots.device), self._caches)
