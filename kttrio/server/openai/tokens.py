"""Text to tokens and back, for whoever wants to count before asking, under paths that vLLM, SGLang
and llama-server have.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from quart import Blueprint, Response

from kttrio.server.answering import open_intake
from kttrio.server.asking.sampling import check_ids
from kttrio.server.asking.tools import Tool
from kttrio.server.bodies import read_body
from kttrio.server.errors import BadRequestError, check_model
from kttrio.server.ids import new_id
from kttrio.server.off_loop import off_loop
from kttrio.server.openai import answers as openai_answers
from kttrio.server.openai.messages import (
    MESSAGES,
    AnyMessage,
    goes_on,
    image_sources,
    template_messages,
)
from kttrio.server.openai.tools import TOOLS
from kttrio.server.prompting import chat_ids
from kttrio.server.replies import json_response
from kttrio.server.requests import ChatRequest, Options
from kttrio.server.schema.kinds import Boolean, Object, Text
from kttrio.server.schema.operations import Operation
from kttrio.server.schema.records import given, ignored, read, refused
from kttrio.server.schema.tokens import TokenIds
from kttrio.server.served_model import ServedModel
from kttrio.server.state import AppState

PREFIXES = ("", "/v1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeBody:
    """POST /tokenize."""

    model: str | None = given(Text(), "the one that is served; absent: the same")
    prompt: str | None = given(Text(), "a text")
    content: str | None = given(Text(), "the same in llama-server's words")
    messages: tuple[AnyMessage, ...] | None = given(MESSAGES, "or a conversation")
    tools: tuple[Tool, ...] = given(TOOLS, "that the conversation has", default=())
    add_special_tokens: bool | None = given(
        Boolean(), "begin as the model's texts do; absent: with texts, not with conversations"
    )
    add_generation_prompt: bool = given(
        Boolean(), "end with the words that begin an answer", default=True
    )
    continue_final_message: bool = given(
        Boolean(), "end in the last message, the assistant's", default=False
    )
    chat_template_kwargs: dict[str, Any] | None = given(Object(), "values for the chat template")
    return_token_strs: bool = given(Boolean(), "tell the tokens' texts, too", default=False)

    with_pieces: None = refused("use 'return_token_strs'")
    chat_template: None = refused("start the server with --chat-template")
    parse_special: None = refused("special tokens are always read as such", harmless=(True,))
    user: None = ignored("answers do not depend on who asks")


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizeBody:
    """POST /detokenize."""

    model: str | None = given(Text(), "the one that is served; absent: the same")
    tokens: tuple[int, ...] = given(TokenIds(), "token ids", required=True)
    skip_special_tokens: bool = given(Boolean(), "special ones leave no text", default=False)


OPERATIONS = tuple(
    operation
    for prefix in PREFIXES
    for operation in (
        Operation(
            method="post",
            path=f"{prefix}/tokenize",
            summary="The tokens of a text or conversation.",
            tag="Tokens",
            body=TokenizeBody,
            answer=openai_answers.TOKENS,
        ),
        Operation(
            method="post",
            path=f"{prefix}/detokenize",
            summary="The text of tokens.",
            tag="Tokens",
            body=DetokenizeBody,
            answer=openai_answers.DETOKENIZED,
        ),
    )
)


def blueprint(state: AppState) -> Blueprint:
    """The routes over one server's state."""
    routes = Blueprint("tokens", __name__)

    async def tokenize() -> Response:
        body, num_bytes = await read_body(lambda value: read(TokenizeBody, value))
        ids = await _ids(state, body, num_bytes)
        told = partial(_told, state, ids, pieces=body.return_token_strs)
        return await off_loop(num_bytes, lambda: json_response(told()), patient=True)

    async def detokenize() -> Response:
        body, num_bytes = await read_body(lambda value: read(DetokenizeBody, value))
        return await off_loop(num_bytes, lambda: json_response(_texts(state.model, body)))

    for prefix in PREFIXES:
        routes.add_url_rule(f"{prefix}/tokenize", view_func=tokenize, methods=["POST"])
        routes.add_url_rule(f"{prefix}/detokenize", view_func=detokenize, methods=["POST"])
    return routes


async def _ids(state: AppState, body: TokenizeBody, num_bytes: int) -> tuple[int, ...]:
    check_model(body.model, state.model.name)
    _check_one(body)
    if body.messages is None:
        text, tokenizer = body.prompt or body.content or "", state.model.tokenizer
        special = body.add_special_tokens is not False
        return await off_loop(
            num_bytes, lambda: tuple(tokenizer.encode(text, add_special_tokens=special))
        )
    if body.add_special_tokens:
        message = "'add_special_tokens' must not be true with 'messages': the template has them."
        raise BadRequestError(message, "add_special_tokens", "invalid_value")
    intake = open_intake(state, new_id("tokenize-"), num_bytes)
    return await chat_ids(state.model, _chat(body, body.messages), intake)


def _check_one(body: TokenizeBody) -> None:
    given = [body.prompt, body.content, body.messages]
    if sum(value is not None for value in given) != 1:
        message = "Give one of 'prompt', 'content' and 'messages'."
        raise BadRequestError(message, "prompt", "missing_required_parameter")


def _chat(body: TokenizeBody, messages: tuple[AnyMessage, ...]) -> ChatRequest:
    return ChatRequest(
        options=Options(),
        messages=template_messages(messages),
        images=image_sources(messages),
        tools=list(body.tools),
        continues=body.continue_final_message and goes_on(messages),
        generation_prompt=body.add_generation_prompt,
        template_kwargs=body.chat_template_kwargs or {},
    )


def _told(state: AppState, ids: tuple[int, ...], *, pieces: bool) -> dict[str, Any]:
    told = {"tokens": ids, "count": len(ids), "max_model_len": state.engine.longest_sequence}
    if pieces:
        told["token_strs"] = [state.model.tokenizer.piece(token) for token in ids]
    return told


def _texts(model: ServedModel, body: DetokenizeBody) -> dict[str, str]:
    check_model(body.model, model.name)
    check_ids(body.tokens, vocab_size=model.tokenizer.vocab_size, path="tokens")
    skips = body.skip_special_tokens
    text = model.tokenizer.decode(list(body.tokens), skip_special_tokens=skips)
    # vLLM's, SGLang's and llama-server's name for it
    return {"prompt": text, "text": text, "content": text}
