"""Streamed responses: whatever the deltas, the events add up to the whole answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kttrio.request import TokenLogprob
from kttrio.server import sse
from kttrio.server.completion import Usage
from kttrio.server.decoding import Answer, CallDelta, Delta
from kttrio.server.errors import ApiError
from kttrio.server.responses.output import REASONING, SUMMARY, Head, TextShape, whole_response
from kttrio.server.responses.stream import ResponsesStream
from kttrio.text.tokenizer import Tokenizer
from tests.server.responses_replay import Event, read_named_events, replay, without_ids
from tests.tokenizers_fake import make_tiny_tokenizer

ECHO = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "model": "m"}
HEAD = Head("resp_1", 1, json.dumps(ECHO))
USAGE = Usage(prompt_tokens=3, completion_tokens=5, reasoning_tokens=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(make_tiny_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))))


@dataclass
class Wire:
    """Takes an event stream's bytes."""

    writes: list[bytes] = field(default_factory=list)
    ended: bool = False

    def put(self, events: bytes) -> None:
        assert not self.ended
        self.writes.append(events)

    def end(self) -> None:
        self.ended = True

    @property
    def events(self) -> list[Event]:
        assert self.ended
        return read_named_events(b"".join(self.writes))


def stream(
    tokenizer: Tokenizer,
    news: Sequence[Delta | str],
    *,
    reasoning: TextShape = REASONING,
    error: ApiError | None = None,
) -> Wire:
    wire = Wire()
    events = cast("sse.EventStream", wire)
    listener = ResponsesStream(HEAD, events, tokenizer, reasoning=reasoning)
    for one in news:
        if isinstance(one, str):
            listener.on_text(0, one)
        else:
            listener.on_delta(0, one)
    listener.on_end(error, USAGE)
    return wire


TEXT = st.text(min_size=1, max_size=5)
SCORES = st.lists(st.integers(0, 300).map(lambda token: TokenLogprob(token, -1.0)), max_size=2)
STEPS = st.lists(
    st.one_of(
        TEXT,
        st.tuples(TEXT, st.just(""), st.just(()), SCORES).map(lambda told: Delta(*told)),
        st.tuples(st.just(""), TEXT).map(lambda told: Delta(*told)),
        st.tuples(TEXT, TEXT, st.just(()), SCORES).map(lambda told: Delta(*told)),
        st.sampled_from(["start", "more", "both"]),
    ),
    max_size=12,
)


def with_calls(steps: Sequence[Delta | str]) -> list[Delta | str]:
    """The words for calls as their pieces: a call goes on only while nothing else comes."""
    news: list[Delta | str] = []
    number, going_on = -1, False
    for step in steps:
        if step in ("start", "both") or (step == "more" and not going_on):
            number, going_on = number + 1, True
            start = CallDelta(number, "", f"call_{number}", "f")
            more = [CallDelta(number, '{"a":')] if step == "both" else []
            news.append(Delta(calls=[start, *more]))
        elif step == "more":
            news.append(Delta(calls=[CallDelta(number, "1")]))
        else:
            going_on = False
            news.append(step)
    return news


@settings(deadline=None, max_examples=150)
@given(
    steps=STEPS,
    finish=st.sampled_from(["stop", "length", "tool_calls"]),
    reasoning=st.sampled_from([REASONING, SUMMARY]),
)
def test_a_stream_adds_up_to_the_whole(
    tokenizer: Tokenizer, steps: list[Delta | str], finish: str, reasoning: TextShape
) -> None:
    news = [*with_calls(steps), Delta(finish=finish)]
    streamed = replay(stream(tokenizer, news, reasoning=reasoning).events)
    deltas = [Delta(one) if isinstance(one, str) else one for one in news]
    whole = whole_response(
        HEAD, Answer.of(deltas), USAGE, tokenizer=tokenizer, reasoning=reasoning, now=2
    )
    assert without_ids(streamed) == without_ids(json.loads(whole))
    assert streamed["status"] == ("incomplete" if finish == "length" else "completed")


def test_each_step_is_one_write(tokenizer: Tokenizer) -> None:
    call = [CallDelta(0, "", "call_0", "f"), CallDelta(0, "{}")]
    wire = stream(tokenizer, ["a", "b", Delta("c", "why"), Delta(calls=call, finish="tool_calls")])
    assert len(wire.writes) == 6


def test_an_answer_of_nothing_is_an_empty_message(tokenizer: Tokenizer) -> None:
    response = replay(stream(tokenizer, [Delta(finish="stop")]).events)
    (item,) = response["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", "")


def test_a_failure_is_told_in_both_ways_and_keeps_what_came(tokenizer: Tokenizer) -> None:
    error = ApiError(500, "The engine died.", code="engine_error")
    events = stream(tokenizer, ["Hal"], error=error).events
    response = replay(events)
    assert (events[-2]["type"], events[-2]["code"]) == ("error", "engine_error")
    assert response["error"] == {"code": "server_error", "message": "The engine died."}
    assert (response["status"], response["output"][0]["status"]) == ("failed", "incomplete")
    assert response["output"][0]["content"][0]["text"] == "Hal"


def test_only_the_item_that_was_cut_off_is_incomplete(tokenizer: Tokenizer) -> None:
    call = [CallDelta(0, "", "call_0", "f"), CallDelta(0, '{"a')]
    response = replay(stream(tokenizer, ["a", Delta(calls=call, finish="length")]).events)
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None
