"""OpenAI's routes: chat and text completions, and the list of models.

Bodies are read in openai_request.py and answers written in openai_response.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from quart import Blueprint, Response, request

from kttrio.server import sse
from kttrio.server.completion import Collector, Completion, Listener
from kttrio.server.connection import SCOPE_KEY
from kttrio.server.decoding import Answer
from kttrio.server.fields import Fields, parse_object
from kttrio.server.openai_request import parse_chat, parse_text, unknown_model
from kttrio.server.openai_response import (
    ChatStream,
    Head,
    TextStream,
    chat_object,
    text_object,
)
from kttrio.server.prompting import Intake, Prepared, off_loop, prepare_chat, prepare_text
from kttrio.server.responses import LiveResponse, json_response
from kttrio.server.state import AppState, new_id

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Parse(Protocol[T_co]):
    """One of openai_request.py's readers of bodies."""

    def __call__(self, fields: Fields, *, model: str, vocab_size: int) -> T_co: ...


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
        return json_response({"object": "list", "data": [_model_fields(state)]})

    @routes.get("/models/<path:name>")
    async def model(name: str) -> Response:
        if name != state.model.name:
            raise unknown_model(name, state.model.name)
        return json_response(_model_fields(state))

    return routes


def _model_fields(state: AppState) -> dict[str, Any]:
    return {
        "id": state.model.name,
        "object": "model",
        "created": state.model.created,
        "owned_by": "kttrio",
        "max_model_len": state.engine.longest_sequence,
    }


async def _chat(state: AppState) -> Response:
    asked, num_bytes = await _read_body(parse_chat, state)
    model = state.model
    head = Head(new_id("chatcmpl"), int(time.time()), model.name)
    prepared = await prepare_chat(model, asked, _intake(state, head, num_bytes))
    if asked.options.stream:
        usage = asked.options.include_usage
        return _live(
            state,
            prepared,
            lambda stream: ChatStream(head, stream, model.tokenizer, include_usage=usage),
        )
    answers, completion = await _collect(state, prepared)
    return json_response(
        chat_object(
            head,
            answers,
            completion.usage,
            tokenizer=model.tokenizer,
            version=state.config.weight_version,
        )
    )


async def _text(state: AppState) -> Response:
    asked, num_bytes = await _read_body(parse_text, state)
    model = state.model
    head = Head(new_id("cmpl"), int(time.time()), model.name)
    prepared = await prepare_text(model, asked, _intake(state, head, num_bytes))
    prompts = prepared.prompts
    if asked.options.stream:
        usage = asked.options.include_usage
        return _live(
            state,
            prepared,
            lambda stream: TextStream(
                head, stream, model.tokenizer, include_usage=usage, prompts=prompts
            ),
        )
    answers, completion = await _collect(state, prepared)
    return json_response(
        text_object(
            head,
            answers,
            completion.usage,
            tokenizer=model.tokenizer,
            version=state.config.weight_version,
            prompts=prompts,
        )
    )


async def _read_body(parse: Parse[T], state: AppState) -> tuple[T, int]:
    """The request, whatever its content type says, and the length of its body in bytes."""
    body = await request.get_data(cache=False, as_text=False, parse_form_data=False)
    model = state.model

    def read() -> T:
        fields = parse_object(body)
        return parse(fields, model=model.name, vocab_size=model.tokenizer.vocab_size)

    return await off_loop(len(body), read), len(body)


def _intake(state: AppState, head: Head, num_bytes: int) -> Intake:
    return Intake(
        request_id=head.id,
        num_bytes=num_bytes,
        context_length=state.engine.longest_sequence,
        most_sequences=state.engine.most_sequences,
        seed=state.seeds.getrandbits(63),
    )


async def _collect(state: AppState, prepared: Prepared) -> tuple[list[Answer], Completion]:
    """Run a request that is answered as a whole. A client that leaves cancels it."""
    collector = Collector(len(prepared.requests))
    completion = Completion(prepared, collector)
    with state.track(completion):
        async with completion.open(state.engine):
            return await collector.answers(), completion


def _live(
    state: AppState, prepared: Prepared, listen: Callable[[sse.EventStream], Listener]
) -> LiveResponse:
    """A response whose events the engine's fan-out pushes; its task waits for their end."""

    async def run(scope: Any, send: sse.Send) -> None:
        connection = scope["state"][SCOPE_KEY]
        stream = sse.EventStream(connection, chunked=scope["http_version"] == "1.1")
        completion = Completion(prepared, listen(stream))
        with state.track(completion):
            async with completion.open(state.engine):
                await stream.run(send, state.config.stream_keepalive_seconds)

    return LiveResponse(run)
