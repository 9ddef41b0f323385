"""One request's progress. Mutable, and never leaves engine/: the runner sees chunks of it only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum, auto
from functools import partial
from typing import Any

from kttrio.plan import Chunk, ChunkResult
from kttrio.request import FinishReason, GenerateRequest, TokenEvent, TokenLogprob

# One of each for every token: a named tuple's own constructor takes more than twice as long.
_chunk_of: Callable[[tuple[Any, ...]], Chunk] = partial(tuple.__new__, Chunk)
_event_of: Callable[[tuple[Any, ...]], TokenEvent] = partial(tuple.__new__, TokenEvent)


class Stage(Enum):
    """Where a sequence stands. Only preemption leads back: RUNNING, PREEMPTED, RUNNING again."""

    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


class Sequence:
    """A request with what it holds (slot, pages) and how far it has come.

    A chunk carries only the pages that it reaches; that tuple is kept until a chunk crosses into
    a new page, because one is needed at every step.

    A constraint is asked for masks whenever a chunk is to draw: they are made while the step runs.
    It hears of each output; preemption is none of its business.

    With drafts the chunk of a decoding sequence is the token drawn last and what the step before
    drafted after it; as many of them as are accepted become outputs at once.
    """

    __slots__ = (
        "_backlog",
        "_constraint",
        "_drafts",
        "_max_drafts",
        "_outputs",
        "_page_size",
        "_prompt_logprobs",
        "_reached_pages",
        "_reached_tokens",
        "_sampling",
        "abandoned",
        "in_flight",
        "max_outputs",
        "num_computed",
        "num_known",
        "num_prompt",
        "pages",
        "request",
        "slot",
        "stage",
    )

    def __init__(
        self, request: GenerateRequest, *, page_size: int, max_outputs: int, max_drafts: int = 0
    ) -> None:
        self.request = request
        self.num_prompt = len(request.prompt_ids)
        self.max_outputs = max_outputs
        self.num_known = self.num_prompt  # prompt and the outputs so far
        self.num_computed = 0  # tokens whose KV and state the runner has
        self.stage = Stage.WAITING
        self.in_flight = False  # part of the step that runs now
        self.abandoned = False  # nobody wants it any more; leaves at commit
        self.slot = -1
        self.pages: tuple[int, ...] = ()
        self._page_size = page_size
        # The first output follows the prompt, the last needs no draft after it.
        self._max_drafts = max_drafts if max_outputs > 2 else 0
        self._drafts: tuple[int, ...] = ()
        self._reached_pages: tuple[int, ...] = ()
        self._reached_tokens = 0
        self._outputs: list[int] = []
        self._backlog = request.prompt_ids  # all that was known when it (re)started
        self._sampling = request.sampling
        self._constraint = request.constraint
        self._prompt_logprobs: list[TokenLogprob | None] | None = (
            None if request.sampling.prompt_logprobs is None else [None]
        )

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    @property
    def num_lacking(self) -> int:
        """Known tokens that the runner has not computed."""
        return self.num_known - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """The runner lacks one token only, so it gets on in every step."""
        return self.num_known - self.num_computed == 1

    @property
    def needs_page(self) -> bool:
        """The token drawn last lies beyond its pages; one more page holds it."""
        return self.num_known > len(self.pages) * self._page_size

    @property
    def num_ahead(self) -> int:
        """Tokens beyond the known ones whose places the next chunk can use: the drafts it would
        verify, and all but the last of those made then."""
        return len(self._drafts) + max(self._max_drafts - 1, 0)

    def num_pages(self, growth: int) -> int:
        """Pages for what is known and `growth` more tokens, as far as it can ever grow.

        The last output is never fed back, so it needs no place.
        """
        longest = self.num_prompt + max(self.max_outputs - 1, 0)
        return -(-min(self.num_known + growth, longest) // self._page_size)

    def give_up_ahead(self) -> tuple[int, ...]:
        """Part with the pages that hold nothing but drafts; they are no longer its own."""
        count = self.num_pages(0)
        ahead, self.pages = self.pages[count:], self.pages[:count]
        self._reach(min(self._reached_tokens, count * self._page_size))
        return ahead

    def next_chunk(self, budget: int) -> Chunk:
        """At most `budget` tokens: the one drawn last and its drafts, or the backlog.

        The last of what the runner lacks asks for the next token.
        """
        start = self.num_computed
        end = start + budget
        if end > self.num_known:
            end = self.num_known
        fed_back = end > len(self._backlog)
        token_ids = (self._outputs[-1],) if fed_back else self._backlog[start:end]
        sample = end == self.num_known and self.max_outputs > 0
        if self._max_drafts:
            return self._drafting_chunk(token_ids, sample, budget)
        if end > self._reached_tokens:
            self._reach(end)
        masks = None
        if self._constraint is not None and sample:
            masks = self._constraint.masks(())
        return _chunk_of(
            (
                self.slot,
                start,
                token_ids,
                self._reached_pages,
                self._sampling,
                sample,
                self.num_prompt,
                0,
                0,
                None,
                self.request.images,
                masks,
            )
        )

    def _drafting_chunk(self, token_ids: tuple[int, ...], sample: bool, budget: int) -> Chunk:
        """`token_ids` and the drafts after them, for which there is room, budget and use."""
        end = self.num_computed + len(token_ids)
        length = self.num_prompt + self.max_outputs
        most = min(len(self.pages) * self._page_size, length - 1) - end
        drafts = self._drafts[: max(min(most, budget - len(token_ids)), 0)]
        reach = end + len(drafts) + (self._max_drafts - 1 if sample else 0)
        if reach > self._reached_tokens:
            self._reach(reach)
        constraint = self._constraint
        return Chunk(
            self.slot,
            self.num_computed,
            token_ids + drafts,
            self._reached_pages,
            self._sampling,
            sample,
            self.num_prompt,
            len(drafts),
            min(length - 1, self._reached_tokens + 2) if sample else 0,
            self._backlog[end] if end < self.num_known else None,
            self.request.images,
            constraint.masks(drafts) if constraint is not None and sample else None,
        )

    def _reach(self, num_tokens: int) -> None:
        """Carry the pages of so many tokens, or those there are, from now on."""
        self._reached_pages = self.pages[: -(-num_tokens // self._page_size)]
        self._reached_tokens = len(self._reached_pages) * self._page_size

    def advance(self, chunk: Chunk, result: ChunkResult) -> list[TokenEvent]:
        """Take in what a step found: an event per token; none while the backlog is not through."""
        if result.error is not None:
            return [TokenEvent(None, FinishReason.ERROR, error=result.error)]
        self.num_computed += len(chunk.token_ids) - chunk.num_drafts
        if self._prompt_logprobs is not None and result.prompt_logprobs:
            self._prompt_logprobs.extend(result.prompt_logprobs)
        if self.num_computed < self.num_known:
            return []
        prompt_logprobs = None
        if self._prompt_logprobs is not None:
            prompt_logprobs, self._prompt_logprobs = tuple(self._prompt_logprobs), None
        if not chunk.sample:
            return [TokenEvent(None, FinishReason.LENGTH, None, prompt_logprobs)]
        if not result.tokens:
            error = "the runner drew no token where one was asked for"
            return [TokenEvent(None, FinishReason.ERROR, error=error)]
        self._drafts = result.drafts
        if chunk.num_drafts:
            return self._take_run(result, chunk.num_drafts)
        token = result.tokens[0]
        self._outputs.append(token)
        if self._constraint is not None:
            self._constraint.advance(token)
        self.num_known += 1
        logprob = result.logprobs[0] if result.logprobs else None
        finish = self._reason_to_end(token)
        return [_event_of((token, finish, logprob, prompt_logprobs, None, False, 0))]

    def _take_run(self, result: ChunkResult, num_drafts: int) -> list[TokenEvent]:
        """Accepted drafts and the token after them, or as many of these as the sequence has."""
        events: list[TokenEvent] = []
        num_accepted = len(result.tokens) - 1
        for index, token in enumerate(result.tokens):
            self._outputs.append(token)
            if self._constraint is not None:
                self._constraint.advance(token)
            finish, accepted = self._reason_to_end(token), index < num_accepted
            logprob = result.logprobs[index] if result.logprobs else None
            events.append(TokenEvent(token, finish, logprob, accepted=accepted))
            if finish is not None:
                break
        self.num_known += len(events)
        self.num_computed += len(events) - 1
        rejected = num_drafts - sum(event.accepted for event in events)
        events[-1] = events[-1]._replace(rejected=rejected)
        return events

    def restart(self) -> None:
        """Forget what the runner has: all tokens known so far are computed again from 0.

        The prompt's scores are gathered anew, or no longer asked for once they are delivered.
        """
        self.slot, self.pages = -1, ()
        self.num_computed = self._reached_tokens = 0
        self._reached_pages = self._drafts = ()
        self._backlog = self.request.prompt_ids + tuple(self._outputs)
        if self._prompt_logprobs is not None:
            self._prompt_logprobs = [None]
        elif self._sampling.prompt_logprobs is not None:
            self._sampling = replace(self._sampling, prompt_logprobs=None)

    def _reason_to_end(self, token: int) -> FinishReason | None:
        count = len(self._outputs)
        if token in self._sampling.stop_token_ids and self._may_stop(count):
            return FinishReason.STOP
        return FinishReason.LENGTH if count >= self.max_outputs else None

    def _may_stop(self, num_outputs: int) -> bool:
        """A constraint comes before min_tokens: a stop token is drawn below it only where nothing
        else may be said, and nothing could follow."""
        return num_outputs >= self._sampling.min_tokens or self._constraint is not None
