"""One request as a story: its sequences run in the engine, their tokens come back as deltas.

No protocol's JSON shape: a `Listener` makes that. No task runs per token: the engine's fan-out
calls through to the listener. However a request ends, it leaves by the end of `open`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

import trio

from kttrio.engine.engine import Engine
from kttrio.engine.errors import EngineClosed, QueueFull, RequestTooLarge
from kttrio.engine.event_stream import EventStream
from kttrio.request import Constraint, FinishReason, TokenEvent
from kttrio.server.constraints import MatchedConstraint
from kttrio.server.decoding import Answer, Decoder, Delta
from kttrio.server.errors import ApiError
from kttrio.server.failures import log_failure
from kttrio.server.meter import Meter
from kttrio.server.prompting import Prepared

ABORTED = TokenEvent(None, FinishReason.ABORT)
ERROR = FinishReason.ERROR  # found in the enum anew, it would cost as much as the rest of `feed`

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: each prompt once, the outputs of all its choices."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    drafts: Drafts | None = None
    """None where the server drafts no tokens."""


class Drafts(NamedTuple):
    """What became of the drafts of a request's tokens."""

    accepted: int
    rejected: int


class Listener(Protocol):
    """Who turns a request's news into a protocol's bytes. Called from the engine's fan-out. One
    that raises is told so as an error; one that raises then, too, has its request cut off."""

    def on_text(self, choice: int, text: str) -> None:
        """The commonest delta by far."""
        ...

    def on_delta(self, choice: int, delta: Delta) -> None: ...

    def on_end(self, error: ApiError | None, usage: Usage) -> None:
        """Nothing follows. With an error the answer is incomplete."""
        ...


class Choice:
    """One sequence of a request; `feed` is the engine's sink."""

    def __init__(
        self, index: int, decoder: Decoder, constraint: Constraint | None, completion: Completion
    ) -> None:
        self.finished = False
        self.end = "abort"
        """Why it ended: left alone, because nobody waits for it any more."""
        self.stream: EventStream | None = None
        self._index = index
        self._decoder = decoder
        self._constraint = constraint
        self._completion = completion
        self._listener = completion.listener

    def feed(self, event: TokenEvent) -> None:
        """Take in one step's news. Never raises: what goes wrong ends this request only."""
        if self.finished:
            return
        completion = self._completion
        try:
            if event.finish is ERROR:
                completion.fail(_failure(event, self._constraint))
                return
            if completion.waits:
                completion.begin()
            news = self._decoder.feed(event)
            if isinstance(news, str):
                if news:
                    self._listener.on_text(self._index, news)
                return
            for delta in news:
                self._tell(delta)
        except Exception as error:
            completion.log_failure(error)
            completion.fail(unwritten())

    def _tell(self, delta: Delta) -> None:
        self._listener.on_delta(self._index, delta)
        if delta.finish is not None:
            self.end = delta.finish
            self.close()
            self._completion.end_if_finished()

    def close(self) -> None:
        """Let no event follow; what the engine still computes for this sequence is stopped."""
        self.finished = True
        if self.stream is not None:
            self.stream.close()


class Completion:
    """A request's sequences, from admission to the last delta. Choice i is sequence i."""

    def __init__(self, prepared: Prepared, listener: Listener, meter: Meter) -> None:
        self.listener = listener
        self.waits = True
        """For its first token."""
        self.was_taken = False
        """By the engine."""
        self.ended_at: float | None = None
        self._prepared = prepared
        self._meter = meter
        self._speculates = False
        self._mute = trio.CancelScope()
        """Cancelled where the listener cannot even tell that it failed."""
        self._choices = [
            Choice(index, decoder, request.constraint, self)
            for index, (decoder, request) in enumerate(
                zip(prepared.decoders, prepared.requests, strict=True)
            )
        ]

    @asynccontextmanager
    async def open(self, engine: Engine) -> AsyncIterator[None]:
        """Run the sequences for as long as the block lasts. Raises ApiError when refused, and
        out of the block where the listener cannot tell the end."""
        self._speculates = engine.speculates
        with self._mute:
            async with self._run(engine):
                yield
        if self._mute.cancelled_caught:
            raise unwritten()

    @asynccontextmanager
    async def _run(self, engine: Engine) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if self._prepared.image_memory is not None:
                stack.callback(self._prepared.image_memory.release)
            for choice, request in zip(self._choices, self._prepared.requests, strict=True):
                try:
                    stream = engine.open(request, choice.feed)
                    choice.stream = await stack.enter_async_context(stream)
                except (RequestTooLarge, QueueFull, EngineClosed) as error:
                    raise refusal(error) from error
            self.was_taken = True
            yield

    @property
    def names(self) -> tuple[str, ...]:
        """By each of which it can be aborted."""
        intake, client_id = self._prepared.intake, self._prepared.client_id
        return tuple(filter(None, (intake.request_id, intake.visit_id, client_id)))

    @property
    def label(self) -> str:
        """What the log calls it."""
        intake = self._prepared.intake
        return f"{intake.request_id} (request {intake.visit_id})"

    @property
    def seconds(self) -> float:
        """From its arrival to its end, or to now."""
        return (self.ended_at or perf_counter()) - self._prepared.intake.arrived

    @property
    def ends(self) -> list[str]:
        """Why each choice ended, in OpenAI's words and two more, `abort` and `error`."""
        return [choice.end for choice in self._choices]

    def begin(self) -> None:
        """The first token is there."""
        self.waits = False
        self._meter.first_tokens.add(self.seconds)

    def abort(self) -> None:
        """End every choice with what it has, for the reason `abort`."""
        self.waits = False
        for choice in self._choices:
            choice.feed(ABORTED)

    def fail(self, error: ApiError) -> None:
        """End the whole request with an error, unless it has ended."""
        for choice in self._choices:
            if not choice.finished:
                choice.end = "error"
            choice.close()
        self._end(error)

    def end_if_finished(self) -> None:
        if all(choice.finished for choice in self._choices):
            self._end(None)

    def _end(self, error: ApiError | None) -> None:
        if self.ended_at is not None:
            return
        self.ended_at = perf_counter()
        if self._tell_end(error):
            return
        for choice in self._choices:
            choice.end = "error"
        if not self._tell_end(unwritten()):
            self._mute.cancel()

    def _tell_end(self, error: ApiError | None) -> bool:
        """Whether the listener could be told."""
        try:
            self.listener.on_end(error, self.usage)
        except Exception as failure:
            self.log_failure(failure)
            return False
        return True

    def log_failure(self, error: Exception) -> None:
        log_failure(logger, f"{self.label}: the answer could not be made", error)

    @property
    def usage(self) -> Usage:
        return usage_of(self._prepared, drafts=self._speculates)


def usage_of(prepared: Prepared, *, drafts: bool) -> Usage:
    """The tokens of a request so far. `drafts`: the server drafts tokens."""
    decoders = prepared.decoders
    return Usage(
        prompt_tokens=prepared.num_prompt_tokens,
        completion_tokens=sum(decoder.num_tokens for decoder in decoders),
        reasoning_tokens=sum(decoder.num_reasoning_tokens for decoder in decoders),
        drafts=_drafts(decoders) if drafts else None,
    )


def _drafts(decoders: Sequence[Decoder]) -> Drafts:
    return Drafts(
        accepted=sum(decoder.num_accepted for decoder in decoders),
        rejected=sum(decoder.num_rejected for decoder in decoders),
    )


class Collector:
    """The listener of a request that is answered as a whole."""

    def __init__(self, num_choices: int) -> None:
        self._deltas: list[list[Delta]] = [[] for _ in range(num_choices)]
        self._ended = trio.Event()
        self._error: ApiError | None = None

    def on_text(self, choice: int, text: str) -> None:
        self._deltas[choice].append(Delta(text))

    def on_delta(self, choice: int, delta: Delta) -> None:
        self._deltas[choice].append(delta)

    def on_end(self, error: ApiError | None, usage: Usage) -> None:
        self._error = error
        self._ended.set()

    async def answers(self) -> list[Answer]:
        """Wait for the end: one answer per choice. Raises ApiError for an incomplete one."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error
        return [Answer.of(deltas) for deltas in self._deltas]


def refusal(error: RequestTooLarge | QueueFull | EngineClosed) -> ApiError:
    """The HTTP answer to a request that the engine does not take."""
    if isinstance(error, RequestTooLarge):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, QueueFull):
        code = "queue_full"
        return ApiError(429, str(error), code=code, retry_after=error.retry_after)
    return ApiError(503, str(error), code="engine_unavailable", retry_after=1)


def unwritten() -> ApiError:
    """What the client is told of a listener's failure; the log says more."""
    return ApiError(500, "The server failed to write the answer.")


def _failure(event: TokenEvent, constraint: Constraint | None) -> ApiError:
    """Of the engine, unless what the request asked for could not be held to."""
    if isinstance(constraint, MatchedConstraint) and constraint.complaint is not None:
        return ApiError(400, constraint.complaint, code="invalid_value")
    message = event.error or "The engine ended this request."
    return ApiError(500, message, code="engine_error")
