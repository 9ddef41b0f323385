"""One stream, whose events the test pushes."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

from kttrio.engine.event_stream import EventStream
from kttrio.request import FinishReason, TokenEvent

LAST = TokenEvent(3, FinishReason.STOP)


class Left:
    """Counts how often the request was given up."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


async def test_unread_events_are_kept_in_order() -> None:
    stream = EventStream(Left(), None)
    for event in (TokenEvent(1), TokenEvent(2), LAST):
        stream.push(event)
    assert await stream.wait() == LAST
    assert [event async for event in stream] == [TokenEvent(1), TokenEvent(2), LAST]


async def test_second_consumer_is_refused() -> None:
    stream = EventStream(Left(), None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.wait)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await stream.wait()
        stream.push(LAST)


async def test_who_waits_may_be_cancelled_and_wait_again() -> None:
    stream = EventStream(Left(), None)
    with trio.move_on_after(0):
        await stream.wait()
    stream.push(LAST)
    assert await stream.wait() == LAST


async def test_close_forgets_what_was_not_read() -> None:
    left = Left()
    stream = EventStream(left, None)
    stream.push(TokenEvent(1))
    stream.close()
    stream.close()
    assert left.times == 1
    assert (await stream.wait()).finish is FinishReason.ABORT
    assert [event async for event in stream] == []


def test_a_sink_that_raises_gives_the_request_up(caplog: pytest.LogCaptureFixture) -> None:
    def sink(event: TokenEvent) -> None:
        raise KeyError("my sink")

    left = Left()
    stream = EventStream(left, sink)
    with caplog.at_level(logging.ERROR):
        stream.push(TokenEvent(1))
    assert (left.times, stream.last and stream.last.finish) == (1, FinishReason.ERROR)
    assert "the sink of a request raised" in caplog.text
