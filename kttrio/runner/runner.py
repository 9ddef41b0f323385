"""The runner: a plan's tokens through the model, the next tokens out, one step at a time.

Owns the model, its caches and the sampler. What a sequence leaves behind here (token counts, the
last row of a scored prompt) is forgotten when its slot begins anew, so that a step that failed
spoils nothing but its own sequences.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kttrio.layers.batch import Batch
from kttrio.layers.cache import LayerCache
from kttrio.plan import Capacity, Chunk, ChunkResult, StepPlan, StepResult
from kttrio.request import TokenLogprob
from kttrio.runner.logprobs import PromptScorer, PromptScores, read_scores
from kttrio.runner.sampler import Sampled, Sampler
from kttrio.runner.tensors import StepBuilder, StepTensors

log = logging.getLogger(__name__)

NOT_FINITE = "the model's logits are not finite"


class StepModel(Protocol):
    """What a step needs of a model; `models.base.CausalLM` says what is promised."""

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

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
        facts: Mapping[str, object] | None = None,
    ) -> None:
        self.facts = dict(facts or {})
        """What was decided when it was built, for people to read: plain values."""
        self._model = model
        self._caches = caches
        self._capacity = capacity
        self._builder = StepBuilder(page_size=capacity.page_size, device=device)
        self._sampler = Sampler(
            num_slots=capacity.num_slots, vocab_size=capacity.vocab_size, device=device
        )
        self._scorer = PromptScorer(model.logits)

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
            step = self._builder.build(plan)
            hidden = self._model.forward(step.batch, self._caches)
            found = self._evaluate(step, hidden)
        results = [found[place] for place in np.argsort(step.order).tolist()]
        return StepResult(tuple(results), time.perf_counter() - begun)

    def close(self) -> None:
        """Free model and caches; no step may follow."""
        self._caches.clear()
        self._model.close()

    def _evaluate(self, step: StepTensors, hidden: Tensor) -> list[ChunkResult]:
        """Score and sample what the chunks ask for; one result per chunk of `step`."""
        offsets = step.batch.offsets
        self._sampler.observe(step.chunks)
        prompts = [
            self._scorer.score(chunk, hidden[offsets[i] : offsets[i + 1]])
            for i, chunk in enumerate(step.chunks)
        ]
        sampling = [i for i, chunk in enumerate(step.chunks) if chunk.sample]
        sampled = None
        if sampling:
            rows = [offsets[i + 1] - 1 for i in sampling]
            last = hidden if len(rows) == len(hidden) else hidden[rows]
            sampled = self._sampler.sample(
                self._model.logits(last), [step.chunks[i] for i in sampling]
            )
        return _read(step.chunks, sampling, sampled, prompts)


def _read(
    chunks: Sequence[Chunk],
    sampling: Sequence[int],
    sampled: Sampled | None,
    prompts: Sequence[PromptScores | None],
) -> list[ChunkResult]:
    """Bring all findings to the host in one copy and write them down chunk by chunk."""
    on_device = [scores.scores for scores in prompts if scores is not None]
    if sampled is not None:
        on_device += [sampled.tokens, sampled.best]
        if sampled.scores is not None:
            on_device.append(sampled.scores)
    arrays = _to_host(on_device)
    broken: set[int] = set()
    prompt_logprobs = {}
    for i, scores in enumerate(prompts):
        if scores is not None:
            array = next(arrays)
            prompt_logprobs[i] = scores.read(array)
            if not np.isfinite(array[:, 0]).all():
                broken.add(i)
    tokens: dict[int, int] = {}
    logprobs: dict[int, TokenLogprob] = {}
    if sampled is not None:
        drawn, best = next(arrays).astype(np.int64).tolist(), next(arrays)
        broken.update(sampling[row] for row in np.flatnonzero(~np.isfinite(best)).tolist())
        tokens = dict(zip(sampling, drawn, strict=True))
        if sampled.scores is not None:
            scored = [sampling[row] for row in sampled.scored]
            records = read_scores(
                [tokens[i] for i in scored],
                next(arrays),
                [chunks[i].sampling.logprobs or 0 for i in scored],
            )
            logprobs = dict(zip(scored, records, strict=True))
    if broken:
        _report(broken, chunks)
    return [
        ChunkResult(None, error=NOT_FINITE)
        if i in broken
        else ChunkResult(tokens.get(i), logprobs.get(i), prompt_logprobs.get(i))
        for i in range(len(chunks))
    ]


def _to_host(tensors: Sequence[Tensor]) -> Iterator[NDArray[np.float64]]:
    """All tensors as arrays, by one copy; float64 holds token ids and float32 exactly."""
    if not tensors:
        return
    flat = torch.cat([tensor.flatten().double() for tensor in tensors]).cpu().numpy()
    first = 0
    for tensor in tensors:
        yield flat[first : first + tensor.numel()].reshape(tensor.shape)
        first += tensor.numel()


def _report(broken: set[int], chunks: Sequence[Chunk]) -> None:
    """One broken sequence may be its own fault; when all are, the step has failed."""
    slots = sorted(chunks[i].slot for i in broken)
    if len(broken) == len(chunks):
        raise FloatingPointError(f"{NOT_FINITE}, in every sequence: slots {slots}")
    log.error("%s for the sequences in slots %s", NOT_FINITE, slots)
