"""OpenAI's routes for responses. None is stored: what asks for a stored one is told so.

Bodies are read in request.py and answers written in output.py and
stream.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from quart import Blueprint, Response

from kttrio.server.answering import collect, open_intake, stream
from kttrio.server.bodies import read_body
from kttrio.server.errors import ApiError, BadRequestError
from kttrio.server.ids import new_id
from kttrio.server.prompting import Prepared, chat_ids, prepare_chat
from kttrio.server.replies import json_response, written_response
from kttrio.server.responses import answers as responses_answers
from kttrio.server.responses.output import (
    REASONING,
    SUMMARY,
    Head,
    join_objects,
    whole_response,
    write_json,
)
from kttrio.server.responses.request import AskedResponse, ResponsesBody, parse_response
from kttrio.server.responses.stream import ResponsesStream
from kttrio.server.schema.operations import Operation, Parameter
from kttrio.server.state import AppState

TAG = "OpenAI responses"
PREFIX = "/v1/responses"
RESPONSE_ID = Parameter(name="response_id", help="of a response")
NOT_STORED = (
    ("get", ""),
    ("delete", ""),
    ("get", "/input_items"),
    ("post", "/cancel"),
)
"""Methods, and paths behind a response's id, that other servers have for what they stored."""
OPERATIONS = (
    Operation(
        method="post",
        path=PREFIX,
        summary="The answer to a history of items.",
        tag=TAG,
        body=ResponsesBody,
        answer=responses_answers.RESPONSE,
        streams=True,
    ),
    Operation(
        method="post",
        path=f"{PREFIX}/input_tokens",
        summary="How many tokens a response would be the answer to.",
        tag=TAG,
        body=ResponsesBody,
        answer=responses_answers.COUNT,
    ),
    *(
        Operation(
            method=method,
            path=f"{PREFIX}/{{response_id}}{path}",
            summary="There is none: no response is stored.",
            tag=TAG,
            answer=None,
            parameters=(RESPONSE_ID,),
        )
        for method, path in NOT_STORED
    ),
)


def blueprint(state: AppState) -> Blueprint:
    """The routes over one server's state."""
    routes = Blueprint("responses", __name__, url_prefix=PREFIX)

    @routes.post("")
    async def create() -> Response:
        return await _create(state)

    @routes.post("/input_tokens")
    async def input_tokens() -> Response:
        return await _count(state)

    async def stored(response_id: str) -> Response:
        raise _not_stored(response_id)

    for method, path in NOT_STORED:
        rule = f"/<response_id>{path}"
        routes.add_url_rule(rule, view_func=stored, methods=[method])

    return routes


def _not_stored(response_id: str) -> ApiError:
    message = (
        f"There is no response '{response_id[:80]}': this server stores none. Send the whole "
        "history as 'input', and close the connection of a response to cancel it."
    )
    return ApiError(404, message, param="response_id", code="not_found")


async def _read(state: AppState) -> tuple[AskedResponse, int]:
    """The request and the length of its body in bytes."""
    model = state.model
    return await read_body(
        lambda value: parse_response(value, model=model.name, vocab_size=model.tokenizer.vocab_size)
    )


@contextmanager
def _input_blamed() -> Iterator[None]:
    """Complaints about a chat's messages name the field that they came from."""
    try:
        yield
    except BadRequestError as error:
        if error.param == "messages":
            raise BadRequestError(error.message, "input", error.code) from error
        raise


async def _create(state: AppState) -> Response:
    asked, num_bytes = await _read(state)
    response_id = new_id("resp_")
    intake = open_intake(state, response_id, num_bytes)
    with _input_blamed():
        prepared = await prepare_chat(state.model, asked.chat, intake)
    head = Head(response_id, int(time.time()), _echo(state, asked, prepared))
    reasoning = SUMMARY if asked.summarize else REASONING
    tokenizer = state.model.tokenizer
    if asked.chat.options.stream:
        return stream(
            state,
            prepared,
            lambda events: ResponsesStream(head, events, tokenizer, reasoning=reasoning),
        )
    answers, completion = await collect(state, prepared)
    return written_response(
        whole_response(
            head,
            answers[0],
            completion.usage,
            tokenizer=tokenizer,
            reasoning=reasoning,
            now=int(time.time()),
        )
    )


def _echo(state: AppState, asked: AskedResponse, prepared: Prepared) -> str:
    """What the response repeats, the checkpoint's own sampling where the request had none."""
    sampling = prepared.requests[0].sampling
    used = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    return join_objects(asked.echo, write_json({"model": state.model.name, **used}))


async def _count(state: AppState) -> Response:
    asked, num_bytes = await _read(state)
    intake = open_intake(state, new_id("resp_"), num_bytes)
    with _input_blamed():
        ids = await chat_ids(state.model, asked.chat, intake)
    return json_response({"object": "response.input_tokens", "input_tokens": len(ids)})
