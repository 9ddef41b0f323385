"""Anthropic's routes: messages, and the count of their tokens.

Bodies are read in request.py and answers written in response.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from quart import Blueprint, Response

from kttrio.server.answering import collect, open_intake, stream
from kttrio.server.anthropic import answers as anthropic_answers
from kttrio.server.anthropic.request import (
    CountBody,
    MessagesBody,
    ThinkingOn,
    to_answer,
    to_count,
)
from kttrio.server.anthropic.response import PING, Head, MessageStream, message_object
from kttrio.server.bodies import read_body
from kttrio.server.errors import aborted
from kttrio.server.ids import new_id
from kttrio.server.prompting import chat_ids, prepare_chat
from kttrio.server.replies import json_response
from kttrio.server.requests import ChatRequest
from kttrio.server.schema.operations import Operation
from kttrio.server.schema.records import read
from kttrio.server.served_model import ServedModel
from kttrio.server.state import AppState
from kttrio.server.visits import current_id

TAG = "Anthropic"
OPERATIONS = (
    Operation(
        method="post",
        path="/v1/messages",
        summary="The next message of a conversation.",
        tag=TAG,
        body=MessagesBody,
        answer=anthropic_answers.MESSAGE,
        streams=True,
        error=anthropic_answers.ERROR,
    ),
    Operation(
        method="post",
        path="/v1/messages/count_tokens",
        summary="The length of a conversation in tokens.",
        tag=TAG,
        body=CountBody,
        answer=anthropic_answers.COUNT,
        error=anthropic_answers.ERROR,
    ),
)

B = TypeVar("B", bound=CountBody)


def blueprint(state: AppState) -> Blueprint:
    """The routes over one server's state."""
    routes = Blueprint("anthropic", __name__, url_prefix="/v1/messages")

    @routes.post("")
    async def messages() -> Response:
        return await _answer(state)

    @routes.post("/count_tokens")
    async def count_tokens() -> Response:
        _, asked, num_bytes = await _read(state.model, CountBody, to_count)
        intake = open_intake(state, new_id("count-"), num_bytes)
        ids = await chat_ids(state.model, asked, intake)
        return json_response({"input_tokens": len(ids)})

    return routes


async def _answer(state: AppState) -> Response:
    model, id = state.model, new_id("msg_")
    body, asked, num_bytes = await _read(model, MessagesBody, to_answer)
    prepared = await prepare_chat(model, asked, open_intake(state, id, num_bytes))
    head = Head(
        id=id,
        model=model.name,
        num_prompt_tokens=prepared.num_prompt_tokens,
        max_tokens=body.max_tokens,
        shows_thinking=_shows(body),
        request_id=current_id(),
    )
    if body.stream:
        return stream(state, prepared, lambda events: MessageStream(head, events), keep_alive=PING)
    (answer,), completion = await collect(state, prepared)
    if answer.finish == "abort":
        raise aborted()
    return json_response(message_object(head, answer, completion.usage))


def _shows(body: MessagesBody) -> bool:
    """Whether reasoning is shown."""
    return not (isinstance(body.thinking, ThinkingOn) and body.thinking.display == "omitted")


async def _read(
    model: ServedModel, record: type[B], ask: Callable[[B, ServedModel], ChatRequest]
) -> tuple[B, ChatRequest, int]:
    """The body, what it asks for, and its length in bytes. Raises ApiError."""

    def build(value: dict[str, Any]) -> tuple[B, ChatRequest]:
        body = read(record, value)
        return body, ask(body, model)

    (body, asked), num_bytes = await read_body(build)
    return body, asked, num_bytes
