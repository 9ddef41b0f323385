"""One request's events, from the step loop to who asked: a task that iterates, or a sink that is
called in the event loop. When they come, and what is in them, is not known here."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from time import perf_counter

import trio

from kttrio.request import FinishReason, TokenEvent

Sink = Callable[[TokenEvent], None]

_log = logging.getLogger(__name__)


class EventStream:
    """The events of one request: iterate over them, or pass a sink and `wait` for the end."""

    __slots__ = ("_events", "_leave", "_sink", "_task", "last", "queued_at", "told_at")

    def __init__(self, leave: Callable[[], None], sink: Sink | None) -> None:
        self.last: TokenEvent | None = None
        """The event that ended the stream; None while it runs."""
        self.queued_at: float | None = perf_counter()
        """None once a step has had it."""
        self.told_at = -1.0
        """When the last step came that brought a token; negative before the first."""
        self._leave = leave
        self._sink = sink
        self._events: deque[TokenEvent] = deque()
        self._task: trio.lowlevel.Task | None = None

    def close(self) -> None:
        """End the request now, from the sink or the owning task; no event follows.

        Does nothing to a stream that has ended.
        """
        if self.last is None:
            self._events.clear()
            self._end(TokenEvent(None, FinishReason.ABORT))

    async def wait(self) -> TokenEvent:
        """Wait for the end and return the last event: ABORT after `close`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self.last is None:
            await self._park()
        return self.last

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> TokenEvent:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._events:
            if self.last is not None:
                raise StopAsyncIteration
            await self._park()
        return self._events.popleft()

    def push(self, event: TokenEvent) -> None:
        """The engine's side: hand over one event. Never raises, whatever the sink does."""
        if event.finish is not None:
            self.last = event
        if self._sink is None:
            self._events.append(event)
            self._wake()
            return
        try:
            self._sink(event)
        except Exception as error:
            _log.exception("the sink of a request raised; the request ends")
            self._end(TokenEvent(None, FinishReason.ERROR, error=f"the sink raised {error!r}"))
        if self.last is not None:
            self._wake()

    def _end(self, last: TokenEvent) -> None:
        self.last = last
        self._leave()
        self._wake()

    def _wake(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    async def _park(self) -> None:
        if self._task is not None:
            raise trio.BusyResourceError("another task waits for this stream already")
        self._task = trio.lowlevel.current_task()

        def give_up(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(give_up)
