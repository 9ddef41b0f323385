"""A long prompt's way through the model: layer by layer, all of it through one before the next.

So each expert is needed once for the whole prompt, and not again for every chunk of it. Mixers take
it in pieces, which are as large as steps; MLPs take all rows at once. The work is cut into units,
of which a step does a few beside its own: those who decode get on meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from kttrio.device.base import Event, Stream
from kttrio.experts.carry import Carry
from kttrio.experts.recorder import Pass, Recorder
from kttrio.layers.batch import Batch
from kttrio.layers.cache import LayerCache
from kttrio.layers.step import Step
from kttrio.models.base import Activations, CacheShape, ModelShape
from kttrio.plan import Capacity, Chunk, ChunkResult, StepPlan
from kttrio.runner.images import Eyes
from kttrio.runner.tensors import StepBuilder, StepTensors

log = logging.getLogger(__name__)

# Of the time that the step beside it takes: those in the step get their tokens half as often at
# worst, but for what one unit takes longer; and the prompt has half of all the time.
_SHARE = 1.0
_ALONE = 0.05  # seconds, where there is no step: so long may newcomers and aborts have to wait
_MOST_TOKENS = 2048  # of a piece: matrix products are at their best by then, and a unit stays short
_INDEX_BYTES = 64  # of a token: its id, its positions, its place in the cache


class LongModel(Protocol):
    """What a passage needs of a model; `models.base.CausalLM` says what is promised."""

    @property
    def num_layers(self) -> int: ...

    def embed(self, batch: Batch) -> Tensor: ...

    def new_step(self, batch: Batch) -> Step: ...

    def mix(self, layer: int, hidden: Tensor, step: Step, caches: list[LayerCache]) -> Tensor: ...

    def feed(
        self, layer: int, rows: Activations, *, piece: int, carry: Carry | None = None
    ) -> Iterator[None]: ...

    def finish(self, hidden: Tensor) -> Tensor: ...

    def new_activations(self, num_tokens: int) -> Activations: ...


@dataclass(frozen=True, slots=True)
class StepParts:
    """What a piece of a prompt shares with steps."""

    builder: StepBuilder
    eyes: Eyes
    conclude: Callable[[StepTensors, Tensor], list[ChunkResult]]
    """From the model's rows to results in the order of the step."""
    recorder: Recorder | None
    main: Stream | None
    """Where a device may lag behind: its main stream."""


class _Piece:
    """Tokens of the prompt that are as many as a step's at most."""

    def __init__(self, step: StepTensors, rows: Activations) -> None:
        self.step, self.rows = step, rows
        self.selections: list[Tensor | None] | None = None
        """What a layer leaves to the next beside the rows."""

    def new_step(self, model: LongModel) -> Step:
        """For one layer: what it shares with the next would be too much to keep for all pieces."""
        step = model.new_step(self.step.batch)
        step.selections = self.selections
        return step


class Passages:
    """Takes long chunks through the model, one at a time."""

    def __init__(
        self, model: LongModel, caches: list[LayerCache], parts: StepParts, *, capacity: Capacity
    ) -> None:
        """Allocates the rows of the longest."""
        self._model, self._caches, self._parts = model, caches, parts
        self._piece = min(capacity.max_step_tokens, _MOST_TOKENS)
        self._page_size = capacity.page_size
        self._room = model.new_activations(capacity.max_long_tokens)
        self._chunk: Chunk | None = None
        self._units: Generator[ChunkResult | None] | None = None
        self._heard: Pass | None = None
        self._last: Event | None = None

    def advance(self, chunk: Chunk | None, *, seconds: float) -> ChunkResult | None:
        """Some way with the chunk, a unit at least; its result when it is through.

        `seconds`: what the step beside it took; 0: there is none. Another chunk than the last time
        ends that one's way, and so does None. What goes wrong is an error in the result: it costs
        the step beside it nothing.
        """
        if chunk != self._chunk:
            self.drop()
        if chunk is None:
            return None
        end = time.perf_counter() + (seconds * _SHARE or _ALONE)
        try:
            result = self._go_on(self._units or self._begin(chunk), end)
        except Exception as error:
            log.exception("a long prompt of %d tokens failed", len(chunk.token_ids))
            result = ChunkResult((), error=f"{type(error).__name__}: {error}")
        if result is not None:
            self.drop()
        return result

    def drop(self) -> None:
        """End what is under way, wherever it stands."""
        units, self._units = self._units, None
        self._chunk = self._heard = self._last = None
        if units is not None:
            units.close()

    def _begin(self, chunk: Chunk) -> Generator[ChunkResult | None]:
        recorder = self._parts.recorder
        self._chunk, self._units = chunk, self._way(chunk)
        self._heard = None if recorder is None else recorder.begin()
        return self._units

    def _go_on(self, units: Iterator[ChunkResult | None], end: float) -> ChunkResult | None:
        with self._recorded():
            while True:
                result = next(units)
                self._keep_pace()
                if result is not None or time.perf_counter() >= end:
                    return result

    def _keep_pace(self) -> None:
        """Wait for the unit before the last: a device that is given more than it does would seem
        to have time left, one that is given nothing until it is done would lose some."""
        if self._parts.main is not None:
            before, self._last = self._last, self._parts.main.record()
            if before is not None:
                before.synchronize()

    def _recorded(self) -> AbstractContextManager[None]:
        recorder = self._parts.recorder
        return nullcontext() if recorder is None else recorder.turn(self._heard)

    def _way(self, chunk: Chunk) -> Generator[ChunkResult | None]:
        """Yields after each unit: None, and the result in the end."""
        rows = self._room.first(len(chunk.token_ids))
        pieces = [
            _Piece(self._parts.builder.build(StepPlan((part,))), own)
            for part, own in zip(
                cut(chunk, self._piece, page_size=self._page_size),
                rows.pieces(self._piece),
                strict=True,
            )
        ]
        yield from self._embed(pieces)
        with Carry() as carry:
            for layer in range(self._model.num_layers):
                yield from self._mix(layer, pieces)
                yield from self._model.feed(layer, rows, piece=self._piece, carry=carry)
        results: list[ChunkResult] = []
        for piece in pieces:
            if results:
                yield None
            results += self._conclude(piece)
        self._record(chunk)
        yield joined(results)

    def _embed(self, pieces: Iterable[_Piece]) -> Iterator[None]:
        for piece in pieces:
            seen = self._parts.eyes.look(piece.step)
            piece.rows.hidden.copy_(self._model.embed(seen.batch))
            yield

    def _mix(self, layer: int, pieces: Iterable[_Piece]) -> Iterator[None]:
        for piece in pieces:
            step, hidden = piece.new_step(self._model), piece.rows.hidden
            hidden.copy_(self._model.mix(layer, hidden, step, self._caches))
            piece.selections = step.selections
            yield

    def _conclude(self, piece: _Piece) -> list[ChunkResult]:
        self._parts.eyes.forget(piece.step.chunks)  # the layer for drafts looks once more
        return self._parts.conclude(piece.step, self._model.finish(piece.rows.hidden))

    def _record(self, chunk: Chunk) -> None:
        if self._parts.recorder is not None and self._heard is not None:
            whole = self._parts.builder.build(StepPlan((chunk,)))
            self._parts.recorder.end(self._heard, whole.batch)


def cut(chunk: Chunk, size: int, *, page_size: int) -> Iterator[Chunk]:
    """The chunks that so many steps would have, each of `size` tokens or what is left."""
    drafting = chunk.draft_end > 0 or chunk.following is not None
    while len(chunk.token_ids) > size:
        first, rest = chunk.token_ids[:size], chunk.token_ids[size:]
        end = chunk.start + size
        yield chunk._replace(
            token_ids=first,
            pages=chunk.pages[: -(-end // page_size)],
            sample=False,
            draft_end=0,
            following=rest[0] if drafting else None,
        )
        chunk = chunk._replace(start=end, token_ids=rest)
    yield chunk


def joined(results: Sequence[ChunkResult]) -> ChunkResult:
    """One result of those of consecutive pieces: only the last one has tokens."""
    scored = [found.prompt_logprobs for found in results if found.prompt_logprobs is not None]
    scores = tuple(chain.from_iterable(scored)) if scored else None
    return results[-1]._replace(prompt_logprobs=scores)


def passage_bytes(
    shape: ModelShape,
    caches: CacheShape,
    *,
    row_bytes: int,
    recorded: bool = False,
    deferred: bool = False,
) -> int:
    """What each token of a prompt takes while it passes, beside what steps take: its rows, who was
    chosen for it, and what the layers leave to each other. `row_bytes`: of one, in the model's
    dtype."""
    sums = 3 if deferred else 1  # also what is owed to a layer, and by it
    rows = 2 * row_bytes + sums * shape.hidden_size * torch.float32.itemsize
    chosen = shape.top_k * (torch.int32.itemsize + torch.float32.itemsize)
    heard = shape.num_layers * shape.top_k * torch.int32.itemsize if recorded else 0
    # Twice: pieces, and the whole that is made of them.
    return rows + 2 * (chosen + heard) + caches.bytes_chosen + _INDEX_BYTES
