"""Drafts for the next step: the model's prediction layer, run over what the step has settled.

At position p the layer takes the hidden row of p and the token at p + 1, and foretells the one at
p + 2. It must have seen every position of a sequence, prompts included, before its keys and values
are whole. Drafts after the first are made of the layer's own output; what it writes for them is
written again once the true tokens are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from kttrio.layers.batch import Batch, sent
from kttrio.layers.cache import LayerCache
from kttrio.plan import Chunk, ChunkResult, StepPlan
from kttrio.runner.images import Eyes
from kttrio.runner.tensors import StepBuilder, StepTensors


class DraftModel(Protocol):
    """What drafting needs of a model; `models.base.CausalLM` says what is promised."""

    def draft(self, batch: Batch, hidden: Tensor, caches: list[LayerCache]) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class _Pass(NamedTuple):
    """One sequence's part of a pass through the prediction layer."""

    number: int  # of its chunk in the step
    chunk: Chunk  # the tokens that follow the positions it covers
    rows: Sequence[int]  # of the hidden states that belong to these positions
    wanted: int  # drafts to be made from here on


class Drafter:
    """Makes at most `num_drafts` drafts for each sequence that will go on."""

    def __init__(
        self, model: DraftModel, builder: StepBuilder, eyes: Eyes, *, num_drafts: int
    ) -> None:
        self._model = model
        self._builder = builder
        self._eyes = eyes
        self._num_drafts = num_drafts

    def draft(
        self,
        step: StepTensors,
        hidden: Tensor,
        results: Sequence[ChunkResult],
        caches: list[LayerCache],
    ) -> list[ChunkResult]:
        """`results`, one per chunk of `step`, with the drafts that belong to them."""
        drafts: list[list[int]] = [[] for _ in results]
        passes = [*self._first(step, results)]
        while passes:
            built = self._builder.build(StepPlan(tuple(each.chunk for each in passes)))
            ordered = self._eyes.look(built, ahead=1)
            passes = [passes[place] for place in ordered.order]
            rows = [row for each in passes for row in each.rows]
            hidden = self._model.draft(ordered.batch, hidden[sent(rows, hidden.device)], caches)
            passes = self._next(passes, ordered.batch.offsets, hidden, drafts)
        return [
            result._replace(drafts=tuple(own)) if own else result
            for result, own in zip(results, drafts, strict=True)
        ]

    def _first(self, step: StepTensors, results: Sequence[ChunkResult]) -> Iterator[_Pass]:
        """The positions that the step has settled, of each sequence that will want drafts."""
        firsts = step.batch.offsets
        for i, (chunk, result) in enumerate(zip(step.chunks, results, strict=True)):
            length = len(chunk.token_ids) - chunk.num_drafts + max(len(result.tokens) - 1, 0)
            following = result.tokens[-1] if result.tokens else chunk.following
            wanted = min(chunk.draft_end - chunk.start - length - 1, self._num_drafts)
            ends = result.error is not None or (result.tokens and wanted <= 0)
            if following is None or ends:
                continue
            yield _Pass(
                number=i,
                chunk=_fed(chunk, chunk.start, (*chunk.token_ids[1:length], following)),
                rows=range(firsts[i], firsts[i] + length),
                wanted=max(wanted, 0),
            )

    def _next(
        self,
        passes: Sequence[_Pass],
        offsets: Sequence[int],
        hidden: Tensor,
        drafts: Sequence[list[int]],
    ) -> list[_Pass]:
        """Note down a draft for each that wants one; the passes that make the drafts after it."""
        wanting = [(each, end - 1) for each, end in zip(passes, offsets[1:], strict=True)]
        wanting = [(each, row) for each, row in wanting if each.wanted]
        if not wanting:
            return []
        logits = self._model.logits(hidden[sent([row for _, row in wanting], hidden.device)])
        further = []
        for (each, row), token in zip(wanting, logits.argmax(-1).tolist(), strict=True):
            drafts[each.number].append(token)
            if each.wanted > 1:
                end = each.chunk.start + len(each.chunk.token_ids)
                chunk = _fed(each.chunk, end, (token,))
                further.append(_Pass(each.number, chunk, (row,), each.wanted - 1))
        return further


def _fed(chunk: Chunk, start: int, token_ids: tuple[int, ...]) -> Chunk:
    return chunk._replace(start=start, token_ids=token_ids, num_drafts=0)
