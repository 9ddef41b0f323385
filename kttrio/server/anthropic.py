"""Anthropic's routes: messages, and the count of their tokens.

Bodies are read in anthropic_request.py and answers written in anthropic_response.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from quart import Blueprint, Response, request

from kttrio.server.answering import collect, open_intake, stream
from kttrio.server.anthropic_request import (
    CountBody,
    MessagesBody,
    ThinkingOn,
    to_answer,
    to_count,
)
from kttrio.server.anthropic_response import PING, Head, MessageStream, message_object
from kttrio.server.fields import parse_object
from kttrio.server.prompting import count_chat, off_loop, prepare_chat
from kttrio.server.records import read
from kttrio.server.replies import json_response
from kttrio.server.requests import ChatRequest
from kttrio.server.served_model import ServedModel
from kttrio.server.state import AppState, new_id

B = TypeVar("B", bound=CountBody)


def blueprint(state: AppState) -> Blueprint:
    """The routes over one server's state."""
    routes = Blueprint("anthropic", __name__, url_prefix="/v1/messages")

    @routes.post("")
    async def messages() -> Response:
        return await _answer(state)

    @routes.post("/count_tokens")
    async def count_tokens() -> Response:
        _, asked, num_bytes = await _read_body(state.model, CountBody, to_count)
        intake = open_intake(state, new_id("count"), num_bytes)
        return json_response({"input_tokens": await count_chat(state.model, asked, intake)})

    return routes


async def _answer(state: AppState) -> Response:
    model, id = state.model, new_id("msg")
    body, asked, num_bytes = await _read_body(model, MessagesBody, to_answer)
    prepared = await prepare_chat(model, asked, open_intake(state, id, num_bytes))
    head = Head(id, model.name, prepared.num_prompt_tokens, body.max_tokens, _shows(body))
    if body.stream:
        return stream(state, prepared, lambda events: MessageStream(head, events), keep_alive=PING)
    (answer,), completion = await collect(state, prepared)
    return json_response(message_object(head, answer, completion.usage))


def _shows(body: MessagesBody) -> bool:
    """Whether reasoning is shown."""
    return not (isinstance(body.thinking, ThinkingOn) and body.thinking.display == "omitted")


async def _read_body(
    model: ServedModel, record: type[B], ask: Callable[[B, ServedModel], ChatRequest]
) -> tuple[B, ChatRequest, int]:
    """The body, what it asks for, and its length in bytes. Raises ApiError."""
    data = await request.get_data(cache=False, as_text=False, parse_form_data=False)

    def read_in() -> tuple[B, ChatRequest]:
        body = read(record, parse_object(data).values)
        return body, ask(body, model)

    return (*await off_loop(len(data), read_in), len(data))
