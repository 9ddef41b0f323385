"""Whatever a record reads becomes a request, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings

from kttrio.server.errors import ApiError
from kttrio.server.openai_request import ChatBody, TextBody, parse_chat, parse_text
from kttrio.server.records import schema
from kttrio.server.requests import ChatRequest, TextRequest
from tests.schema_values import nearly_valid, valid


def outcome(parse: Callable[..., Any], value: Any) -> Any:
    """The request, or why it is none."""
    try:
        return parse(value, model="text", vocab_size=100)
    except ApiError as error:
        return error


@pytest.mark.parametrize(
    ("body", "parse", "kind"),
    [(ChatBody, parse_chat, ChatRequest), (TextBody, parse_text, TextRequest)],
    ids=["chat", "text"],
)
def test_every_body_is_a_request_or_refused(
    body: type, parse: Callable[..., Any], kind: type
) -> None:
    shape = schema(body)

    @settings(max_examples=60)
    @given(valid(shape) | nearly_valid(shape))
    def check(value: Any) -> None:
        told = outcome(parse, value)
        if isinstance(told, ApiError):
            assert told.status == 400 or told.code == "model_not_found"
            assert told.param
            assert len(told.message) < 500
        else:
            assert isinstance(told, kind)

    check()
