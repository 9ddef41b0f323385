"""Framing, templates and the pace of events, over a connection that does as it is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
import trio.testing

from kttrio.server.errors import ApiError
from kttrio.server.sse import KEEP_ALIVE, EventStream, EventTemplate, NumberedTemplate, event

TEXTS = [
    "",
    "plain",
    'quote " and \\',
    "tab\tnew\nline\r\x00\x1f",
    "東京 😀 \u2028",
    "%text%",
    "{}",
]


class FakeConnection:
    """Takes everything, or nothing until `flush`."""

    def __init__(self, *, takes: bool = True) -> None:
        self.takes = takes
        self.written = b""
        self.kept = b""

    @property
    def unsent(self) -> int:
        return len(self.kept)

    def push(self, data: bytes) -> bool:
        if self.takes and not self.kept:
            self.written += data
        else:
            self.kept += data
        return not self.kept

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        self.written, self.kept = self.written + self.kept, b""


async def send_to(connection: FakeConnection, message: dict[str, Any]) -> None:
    connection.written += b"<" + message["type"].rsplit(".", 1)[1].encode() + b">"


async def run(stream: EventStream, connection: FakeConnection, keep_alive: float = 60) -> None:
    await stream.run(lambda message: send_to(connection, message), keep_alive)


def test_an_event_is_one_line_of_json() -> None:
    assert event({"a": ["ü", None]}) == 'data: {"a":["ü",null]}\n\n'.encode()
    assert event("\ud800") == b'data: "?"\n\n'


@pytest.mark.parametrize("text", TEXTS)
def test_a_template_says_what_a_whole_event_would(text: str) -> None:
    template = EventTemplate({"id": 1, "choices": [{"text": "%hole%", "end": None}]}, "%hole%")
    assert template.fill(text) == event({"id": 1, "choices": [{"text": text, "end": None}]})
    assert json.loads(template.fill(text)[6:])["choices"][0]["text"] == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_numbered_template_says_what_a_whole_event_would(text: str) -> None:
    value = {"type": "delta", "number": "%number%", "place": {"at": 0}, "delta": "%hole%"}
    template = NumberedTemplate(value, number="%number%", text="%hole%", name="delta")
    whole = {"type": "delta", "number": 12, "place": {"at": 0}, "delta": text}
    assert template.fill(text, 12) == event(whole, "delta")


def test_half_characters_do_not_break_a_template() -> None:
    assert EventTemplate("%hole%", "%hole%").fill("a\udc80b") == b'data: "a?b"\n\n'


@pytest.mark.parametrize("takes", [True, False])
async def test_events_before_the_head_wait_for_it(takes: bool) -> None:
    connection = FakeConnection(takes=takes)
    stream = EventStream(connection, chunked=False)
    stream.put(b"one ")
    stream.put(b"two ")
    stream.end()
    await run(stream, connection)
    assert connection.written == b"<start>one two <body>"


@pytest.mark.parametrize("takes", [True, False])
async def test_chunks_leave_in_order_however_slow_the_client(takes: bool) -> None:
    connection = FakeConnection(takes=takes)
    stream = EventStream(connection, chunked=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, stream, connection)
        await trio.testing.wait_all_tasks_blocked()
        for word in (b"one", b"two", b"three"):
            stream.put(word)
        await trio.testing.wait_all_tasks_blocked()
        stream.put(b"x" * 20)
        stream.end()
    chunks = b"3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n14\r\n" + b"x" * 20 + b"\r\n"
    assert connection.written == b"<start>" + chunks + b"<body>"


async def test_no_task_runs_for_an_event_that_the_kernel_takes() -> None:
    connection = FakeConnection()
    stream = EventStream(connection, chunked=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, stream, connection)
        await trio.testing.wait_all_tasks_blocked()
        stream.put(b"now")
        assert connection.written == b"<start>3\r\nnow\r\n"
        assert trio.lowlevel.current_statistics().tasks_runnable == 0
        stream.end()


async def test_silence_is_broken_by_comments() -> None:
    connection = FakeConnection()
    stream = EventStream(connection, chunked=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, stream, connection, 0.01)
        while connection.written.count(KEEP_ALIVE) < 3:
            await trio.lowlevel.checkpoint()
        stream.end()
    assert connection.written.replace(KEEP_ALIVE, b"") == b"<start><body>"


REFUSED = ApiError(503, "no")


async def test_a_patient_stream_begins_with_its_first_event(
    autojump_clock: trio.testing.MockClock,
) -> None:
    connection = FakeConnection()
    stream = EventStream(connection, chunked=False, patient=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, stream, connection, 1)
        await trio.sleep(100)
        assert connection.written == b""
        stream.put(b"one ")
        await trio.testing.wait_all_tasks_blocked()
        assert connection.written == b"<start>one "
        stream.fail(REFUSED, b"told ")
    assert connection.written == b"<start>one told <body>"


async def test_a_patient_stream_raises_what_comes_before_its_first_event() -> None:
    connection = FakeConnection()
    stream = EventStream(connection, chunked=False, patient=True)
    stream.fail(REFUSED, b"told ")
    with pytest.raises(ApiError, match="no"):
        await run(stream, connection)
    assert connection.written == b""


async def test_other_streams_tell_it_in_an_event() -> None:
    connection = FakeConnection()
    stream = EventStream(connection, chunked=False)
    stream.fail(REFUSED, b"told ")
    await run(stream, connection)
    assert connection.written == b"<start>told <body>"


async def test_an_empty_event_does_not_end_the_response() -> None:
    connection = FakeConnection()
    stream = EventStream(connection, chunked=True)
    async with trio.open_nursery() as nursery:
        stream.put(b"")
        nursery.start_soon(run, stream, connection)
        await trio.testing.wait_all_tasks_blocked()
        for word in (b"", b"one"):
            stream.put(word)
        stream.end()
    assert connection.written == b"<start>3\r\none\r\n<body>"
