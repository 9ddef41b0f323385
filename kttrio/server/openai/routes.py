"""OpenAI's routes: chat and text completions, and the list of models.

Bodies are read in request.py and answers written in response.py.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from quart import Blueprint, Response

from kttrio.server.answering import collect, open_intake, stream
from kttrio.server.bodies import read_body
from kttrio.server.completion import Usage, usage_of
from kttrio.server.errors import unknown_model
from kttrio.server.ids import new_id
from kttrio.server.openai import answers as openai_answers
from kttrio.server.openai.request import (
    ChatBody,
    TextBody,
    parse_chat,
    parse_text,
)
from kttrio.server.openai.response import (
    ChatStream,
    Extras,
    Head,
    TextStream,
    Whole,
    chat_object,
    text_object,
)
from kttrio.server.prompting import Prepared, prepare_chat, prepare_text
from kttrio.server.replies import json_response
from kttrio.server.requests import Options
from kttrio.server.schema.operations import Operation, Parameter
from kttrio.server.state import AppState

TAG = "OpenAI"
OPERATIONS = (
    Operation(
        method="post",
        path="/v1/chat/completions",
        summary="The next message of a conversation.",
        tag=TAG,
        body=ChatBody,
        answer=openai_answers.CHAT,
        streams=True,
    ),
    Operation(
        method="post",
        path="/v1/completions",
        summary="What follows a text.",
        tag=TAG,
        body=TextBody,
        answer=openai_answers.TEXT,
        streams=True,
    ),
    Operation(
        method="get",
        path="/v1/models",
        summary="The model that is served.",
        tag=TAG,
        answer=openai_answers.MODELS,
    ),
    Operation(
        method="get",
        path="/v1/models/{name}",
        summary="The model of this name.",
        tag=TAG,
        answer=openai_answers.MODEL,
        parameters=(Parameter(name="name", help="of the model"),),
    ),
)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Parse(Protocol[T_co]):
    """One of request.py's readers of bodies."""

    def __call__(self, value: dict[str, Any], *, model: str, vocab_size: int) -> T_co: ...


def blueprint(state: AppState) -> Blueprint:
    """The routes over one server's state."""
    routes = Blueprint("openai", __name__, url_prefix="/v1")

    @routes.post("/chat/completions")
    async def chat_completions() -> Response:
        return await _chat(state)

    @routes.post("/completions")
    async def completions() -> Response:
        return await _text(state)

    @routes.get("/models")
    async def models() -> Response:
        name, data = state.model.name, [_model_fields(state)]
        page = {"has_more": False, "first_id": name, "last_id": name}
        return json_response({"object": "list", "data": data, **page})

    @routes.get("/models/<path:name>")
    async def model(name: str) -> Response:
        if name != state.model.name:
            raise unknown_model(name, state.model.name)
        return json_response(_model_fields(state))

    return routes


def _model_fields(state: AppState) -> dict[str, Any]:
    """In the words of OpenAI's clients and of Anthropic's: both ask at the same path."""
    model, longest = state.model, state.engine.longest_sequence
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "kttrio",
        "max_model_len": longest,
        "type": "model",
        "display_name": model.name,
        "created_at": datetime.fromtimestamp(model.created, UTC).isoformat(),
        "max_input_tokens": longest,
        "lifecycle": "active",
    }


async def _chat(state: AppState) -> Response:
    asked, num_bytes = await _read(parse_chat, state)
    model = state.model
    head = Head(new_id("chatcmpl-"), int(time.time()), model.name)
    prepared = await prepare_chat(model, asked, open_intake(state, head.id, num_bytes))
    extras = _extras(state, asked.options, prepared)
    if asked.options.stream:
        return stream(
            state, prepared, lambda events: ChatStream(head, events, model.tokenizer, extras)
        )
    return json_response(chat_object(await _whole(state, prepared, head, extras), model.tokenizer))


async def _text(state: AppState) -> Response:
    asked, num_bytes = await _read(parse_text, state)
    model = state.model
    head = Head(new_id("cmpl-"), int(time.time()), model.name)
    prepared = await prepare_text(model, asked, open_intake(state, head.id, num_bytes))
    extras = _extras(state, asked.options, prepared)
    if asked.options.stream:
        return stream(
            state, prepared, lambda events: TextStream(head, events, model.tokenizer, extras)
        )
    return json_response(text_object(await _whole(state, prepared, head, extras), model.tokenizer))


def _extras(state: AppState, options: Options, prepared: Prepared) -> Extras:
    def usage() -> Usage:
        return usage_of(prepared, drafts=state.engine.speculates)

    return Extras(
        prompts=prepared.prompts,
        include_usage=options.include_usage,
        usage=usage if options.continuous_usage else None,
        token_ids=options.return_token_ids,
    )


async def _whole(state: AppState, prepared: Prepared, head: Head, extras: Extras) -> Whole:
    answers, completion = await collect(state, prepared)
    return Whole(
        head=head,
        answers=answers,
        usage=completion.usage,
        extras=extras,
        version=state.config.weight_version,
    )


async def _read(parse: Parse[T], state: AppState) -> tuple[T, int]:
    """The request and the length of its body in bytes."""
    model = state.model
    return await read_body(
        lambda value: parse(value, model=model.name, vocab_size=model.tokenizer.vocab_size)
    )
