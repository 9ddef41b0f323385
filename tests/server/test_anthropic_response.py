"""Answers in Anthropic's shape: what cannot be said in JSON, and words for every end and error."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.server.anthropic_response import error_body, read_input, stop_fields
from kttrio.server.anthropic_signature import seal, unseal
from kttrio.server.completion import Usage
from kttrio.server.errors import ApiError


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
        ("abort", None, 3, "max_tokens"),
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
    assert error_body(ApiError(status, "No.")) == {"type": "error", "error": error}


@given(st.text())
def test_a_signature_gives_back_what_it_holds(reasoning: str) -> None:
    assert unseal(seal(reasoning)) == reasoning


@given(st.text())
def test_any_signature_can_be_read(signature: str) -> None:
    assert unseal(signature) == ""
    assert isinstance(unseal("kttrio:" + signature), str)


def test_half_characters_in_hidden_reasoning_become_question_marks() -> None:
    assert unseal(seal("a\ud800b")) == "a?b"
