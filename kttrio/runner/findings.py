"""What a step's hidden states say: scored prompt tokens, sampled tokens, accepted drafts.

A draft is verified by drawing, in its place, the token that plain decoding would draw there: the
same logits, penalties and random number. While the two are equal the next place is drawn. So
drafts never show in what is sampled; and as they are single tokens, not distributions, this
accepts them as often as rejection sampling (Leviathan et al., 2023).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kttrio.plan import Chunk, ChunkResult
from kttrio.request import TokenLogprob
from kttrio.runner.draw import index_of
from kttrio.runner.logprobs import PromptScorer, PromptScores, read_scores
from kttrio.runner.masks import Bits, Mask, wait_for
from kttrio.runner.sampler import Sampled, Sampler
from kttrio.runner.tensors import StepTensors

log = logging.getLogger(__name__)

NOT_FINITE = "the model's logits are not finite"


@dataclass(frozen=True, slots=True)
class _Places:
    """Where tokens are drawn together, one for a chunk."""

    numbers: list[int]  # of the chunks in their step
    before: list[Chunk]  # what plain decoding would have computed last
    rows: list[int]  # of the step's logits


class _Findings:
    """What is known so far of a step's chunks."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks
        self._tokens: dict[int, tuple[int, ...]] = {}
        self._logprobs: dict[int, tuple[TokenLogprob, ...]] = {}
        self._prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = {}
        self._masks: dict[int, tuple[Mask, ...]] = {}
        self._errors: dict[int, str] = {}

    def wait_for_masks(self, *, vocab_size: int) -> None:
        """Have all masks of the step, those behind drafts included; blocks until they are made."""
        self._masks = {
            number: wait_for(chunk, vocab_size=vocab_size)
            for number, chunk in enumerate(self._chunks)
            if chunk.masks is not None and chunk.sample
        }

    def masks(self, places: _Places) -> dict[int, Bits]:
        """What may be drawn, by row of `places`. Where nothing may, the sequence has an error, and
        what is drawn for it does not count."""
        found: dict[int, Bits] = {}
        for row, number in enumerate(places.numbers):
            if number not in self._masks:
                continue
            mask = self._masks[number][len(self._tokens.get(number, ()))]
            if isinstance(mask, str):
                self._errors.setdefault(number, mask)
            elif mask is not None:
                found[row] = mask
        return found

    def read(
        self, prompts: Mapping[int, PromptScores], places: _Places, sampled: Sampled | None
    ) -> None:
        """Bring what was found to the host in one copy and write it down chunk by chunk."""
        on_device = [scores.scores for scores in prompts.values()]
        if sampled is not None:
            on_device += [sampled.tokens, sampled.best]
            if sampled.scores is not None:
                on_device.append(sampled.scores)
        arrays = _to_host(on_device)
        for number, scores in prompts.items():
            array = next(arrays)
            self._prompt_logprobs[number] = scores.read(array)
            if not np.isfinite(array[:, 0]).all():
                self._errors.setdefault(number, NOT_FINITE)
        if sampled is not None:
            self._read_sampled(places, sampled, arrays)

    def _read_sampled(
        self, places: _Places, sampled: Sampled, arrays: Iterator[NDArray[np.float64]]
    ) -> None:
        tokens, best = next(arrays).astype(np.int64).tolist(), next(arrays)
        numbers, known = places.numbers, self._tokens
        for number, token in zip(numbers, tokens, strict=True):
            known[number] = (*known.get(number, ()), token)
        for row in np.flatnonzero(~np.isfinite(best)).tolist():
            self._errors.setdefault(numbers[row], NOT_FINITE)
        if sampled.scores is not None:
            num_top = [places.before[row].sampling.logprobs or 0 for row in sampled.scored]
            records = read_scores([tokens[row] for row in sampled.scored], next(arrays), num_top)
            for row, record in zip(sampled.scored, records, strict=True):
                number = numbers[row]
                self._logprobs[number] = (*self._logprobs.get(number, ()), record)

    def accepted(self, places: _Places) -> _Places:
        """The place after each whose token is the draft that was computed behind it."""
        further = _Places([], [], [])
        for number, before, row in zip(places.numbers, places.before, places.rows, strict=True):
            chunk, end = self._chunks[number], before.start + len(before.token_ids)
            draft = chunk.token_ids[end - chunk.start :][:1]
            if draft and number not in self._errors and self._tokens[number][-1] == draft[0]:
                further.numbers.append(number)
                further.before.append(before._replace(start=end, token_ids=draft))
                further.rows.append(row + 1)
        return further

    def results(self) -> list[ChunkResult]:
        """A sequence whose logits broke may have itself to blame; when all did, the step failed."""
        errors = self._errors
        broken = sorted(self._chunks[i].slot for i in errors if errors[i] == NOT_FINITE)
        if broken:
            if len(broken) == len(self._chunks):
                raise FloatingPointError(f"{NOT_FINITE}, in every sequence: slots {broken}")
            log.error("%s for the sequences in slots %s", NOT_FINITE, broken)
        tokens, logprobs, prompts = self._tokens, self._logprobs, self._prompt_logprobs
        return [
            ChunkResult((), error=errors[i])
            if i in errors
            else ChunkResult(tokens.get(i, ()), logprobs.get(i, ()), prompts.get(i))
            for i in range(len(self._chunks))
        ]


class Evaluator:
    """Keeps what sequences leave behind: token counts, and a scored prompt's last row."""

    def __init__(self, logits: Callable[[Tensor], Tensor], sampler: Sampler) -> None:
        self._logits = logits
        self._sampler = sampler
        self._scorer = PromptScorer(logits)

    def evaluate(self, step: StepTensors, hidden: Tensor) -> list[ChunkResult]:
        """Score and sample what the chunks ask for; one result per chunk of `step`.

        hidden [tokens, hidden] are the rows of the step's batch. Raises FloatingPointError where
        no chunk's logits are finite; where those of some are not, it stands in their results.
        """
        verifies = bool(step.batch.num_drafts)
        known = [_known_part(chunk) for chunk in step.chunks] if verifies else step.chunks
        self._sampler.observe(known)
        findings = _Findings(step.chunks)
        prompts = self._score_prompts(known, step.batch.offsets, hidden)
        rows, places = _places(step, known)
        if not rows:
            findings.read(prompts, places, None)
            return findings.results()
        logits = self._logits(hidden[index_of(rows, hidden)])
        findings.wait_for_masks(vocab_size=logits.shape[-1])
        findings.read(prompts, places, self._draw(logits, places, findings.masks(places)))
        while verifies and (places := findings.accepted(places)).rows:
            self._sampler.observe(places.before)
            findings.read({}, places, self._draw(logits, places, findings.masks(places)))
        return findings.results()

    def _score_prompts(
        self, chunks: Sequence[Chunk], offsets: Sequence[int], hidden: Tensor
    ) -> dict[int, PromptScores]:
        """The scores of the chunks that ask for them, by their number in the step."""
        scored = (
            self._scorer.score(chunk, hidden[offsets[i] : offsets[i + 1]])
            for i, chunk in enumerate(chunks)
        )
        return {i: scores for i, scores in enumerate(scored) if scores is not None}

    def _draw(self, logits: Tensor, places: _Places, masks: Mapping[int, Bits]) -> Sampled:
        return self._sampler.sample(logits[index_of(places.rows, logits)], places.before, masks)


def _known_part(chunk: Chunk) -> Chunk:
    """The chunk as it would be without drafts."""
    if not chunk.num_drafts:
        return chunk
    return chunk._replace(token_ids=chunk.token_ids[: -chunk.num_drafts], num_drafts=0)


def _places(step: StepTensors, known: Sequence[Chunk]) -> tuple[list[int], _Places]:
    """The batch's rows that become logits, and where each sampling chunk draws its first token."""
    ends = step.batch.offsets[1:]
    numbers = [i for i, chunk in enumerate(known) if chunk.sample]
    before = [known[i] for i in numbers]
    if not step.batch.num_drafts:
        return [ends[i] - 1 for i in numbers], _Places(numbers, before, [*range(len(numbers))])
    rows: list[int] = []
    firsts = []
    for i in numbers:
        firsts.append(len(rows))
        rows.extend(range(ends[i] - 1 - step.chunks[i].num_drafts, ends[i]))
    return rows, _Places(numbers, before, firsts)


def _to_host(tensors: Sequence[Tensor]) -> Iterator[NDArray[np.float64]]:
    """All tensors as arrays, by one copy; float64 holds token ids and float32 exactly."""
    if not tensors:
        return
    flat = torch.cat([tensor.flatten().double() for tensor in tensors]).cpu().numpy()
    first = 0
    for tensor in tensors:
        yield flat[first : first + tensor.numel()].reshape(tensor.shape)
        first += tensor.numel()
