"""Answers in Anthropic's shape: what cannot be said in JSON, and words for every end and error."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.server.anthropic.response import (
    Head,
    MessageStream,
    error_fields,
    message_object,
    read_input,
    stop_fields,
)
from kttrio.server.anthropic.signature import seal, unseal
from kttrio.server.completion import Usage
from kttrio.server.decoding import Answer, CallDelta, Delta
from kttrio.server.errors import ApiError
from tests.server.anthropic_front import named_events, put_together


@pytest.mark.parametrize(
    ("arguments", "input"),
    [
        ('{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}),
        ('{"a": NaN, "b": -Infinity, "c": 1e999}', {"a": "NaN", "b": "-Infinity", "c": "1e999"}),
        ('{"a": "half of i', {}),
        ("[1]", {}),
        ("", {}),
        ('{"a":' * 100_000, {}),
        (f'{{"a": {"9" * 5000}}}', {}),
    ],
    ids=range(7),
)
def test_input_is_always_an_object_that_json_can_say(arguments: str, input: object) -> None:
    assert read_input(arguments) == input
    json.dumps(read_input(arguments), allow_nan=False)


@pytest.mark.parametrize(
    ("finish", "matched", "num_tokens", "reason"),
    [
        ("stop", 7, 3, "end_turn"),
        ("stop", "END", 3, "stop_sequence"),
        ("tool_calls", 7, 3, "tool_use"),
        ("length", None, 9, "max_tokens"),
        ("length", None, 8, "model_context_window_exceeded"),
    ],
)
def test_every_end_has_a_word(
    finish: str, matched: int | str | None, num_tokens: int, reason: str
) -> None:
    stop = stop_fields(finish, matched, Usage(1, num_tokens, 0), 9)
    assert stop["stop_reason"] == reason
    assert stop["stop_sequence"] == (matched if isinstance(matched, str) else None)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_every_status_has_a_word(status: int, kind: str) -> None:
    error = {"type": kind, "message": "No."}
    told = {"type": "error", "error": error, "request_id": "req-1"}
    assert error_fields(ApiError(status, "No."), "req-1") == told


class Wire:
    """Takes in what a stream sends."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.ended = False

    def put(self, events: bytes) -> None:
        self.sent.append(events)

    def end(self) -> None:
        self.ended = True


THOUGHTS = st.text(min_size=1).map(lambda text: Delta(reasoning=text))
SAYINGS = st.text(min_size=1).map(Delta)
OBJECTS = st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=2)


@st.composite
def calls(draw: st.DrawFn) -> list[Delta]:
    """A call in pieces; its number is given later."""
    written, pieces = json.dumps(draw(OBJECTS), ensure_ascii=False), []
    while written:
        size = draw(st.integers(1, len(written)))
        pieces.append(written[:size])
        written = written[size:]
    first = CallDelta(0, "", "call", "f")
    return [Delta(calls=[first]), *(Delta(calls=[CallDelta(0, piece)]) for piece in pieces)]


PARTS = st.lists(st.lists(THOUGHTS, min_size=1) | st.lists(SAYINGS, min_size=1) | calls())


@given(PARTS, st.booleans())
def test_a_stream_tells_what_the_whole_message_says(
    parts: list[list[Delta]], shows_thinking: bool
) -> None:
    deltas = [_numbered(delta, number) for number, part in enumerate(parts) for delta in part]
    deltas.append(Delta(finish="stop", matched_stop=7))
    head, usage, wire = Head("id", "m", 5, 9, shows_thinking, None), Usage(5, 3, 1), Wire()
    stream = MessageStream(head, wire)  # type: ignore[arg-type]  # what it uses of a stream
    for delta in deltas:
        if delta == Delta(delta.text):
            stream.on_text(0, delta.text)
        else:
            stream.on_delta(0, delta)
    stream.on_end(None, usage)
    assert wire.ended
    events = [event for event in named_events(b"".join(wire.sent)) if event["type"] != "ping"]
    assert put_together(events) == message_object(head, Answer.of(deltas), usage)


def _numbered(delta: Delta, number: int) -> Delta:
    return delta._replace(calls=[call._replace(number=number) for call in delta.calls])


@given(st.text())
def test_a_signature_gives_back_what_it_holds(reasoning: str) -> None:
    assert unseal(seal(reasoning)) == reasoning


@given(st.text())
def test_any_signature_can_be_read(signature: str) -> None:
    assert unseal(signature) == ""
    assert isinstance(unseal("kttrio:" + signature), str)


def test_half_characters_in_hidden_reasoning_become_question_marks() -> None:
    assert unseal(seal("a\ud800b")) == "a?b"
