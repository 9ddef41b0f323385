"""What OpenAI clients may ask: the bodies of chat and text completions, read and checked.

Nothing is generated here. The records say of every field whether it is served, refused or ignored;
below them stands what depends on two fields, or on the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kttrio.server.asking.forms import GuidedFields, read_form
from kttrio.server.asking.sampling import MAX_CHOICES, MAX_LOGPROBS, check_ids, sampling_options
from kttrio.server.asking.thinking import EFFORTS, template_kwargs
from kttrio.server.asking.tools import Tool
from kttrio.server.errors import check_model
from kttrio.server.openai.messages import (
    MESSAGES,
    AnyMessage,
    goes_on,
    image_sources,
    template_messages,
)
from kttrio.server.openai.tools import TOOL_CHOICE, TOOLS, ToolChoice, use_tools
from kttrio.server.requests import ChatRequest, Options, Prompt, ReasoningView, TextRequest
from kttrio.server.schema.kinds import Boolean, Integer, Object, OneOf, Text, Told, refuse
from kttrio.server.schema.records import Nested, given, ignored, read, refused
from kttrio.server.schema.tokens import TokenIds

MAX_PROMPTS = 1024
ONE_TEMPLATE = "start the server with --chat-template"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """What a stream tells beside the answer."""

    include_usage: bool = given(Boolean(), "a last chunk with the usage", default=False)
    continuous_usage_stats: bool = given(Boolean(), "usage in every chunk", default=False)
    include_obfuscation: None = ignored("chunks are never padded")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedFields(GuidedFields):
    """A body whose answer may be streamed, by the model that it names."""

    model: str | None = given(Text(), "the one that is served; absent: the same")
    stream: bool = given(Boolean(), "answer in server-sent events", default=False)
    stream_options: StreamOptions | None = given(
        Nested(StreamOptions), "only where 'stream' is true"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatBody(StreamedFields):
    """POST /v1/chat/completions."""

    messages: tuple[AnyMessage, ...] = given(MESSAGES, "the conversation", required=True)
    max_completion_tokens: int | None = given(Integer(1), "most tokens of the answer")
    max_tokens: int | None = given(Integer(1), "the same in older words")
    logprobs: bool = given(Boolean(), "tell the tokens' log-probabilities", default=False)
    top_logprobs: int | None = given(Integer(0, MAX_LOGPROBS), "and those of the likeliest")
    tools: tuple[Tool, ...] = given(TOOLS, "functions that the model may call", default=())
    tool_choice: ToolChoice | None = given(
        TOOL_CHOICE, "auto, none, required, a function, or allowed_tools"
    )
    parallel_tool_calls: bool = given(Boolean(), "more than one call", default=True)
    reasoning_effort: str | None = given(OneOf(EFFORTS), "for the template; none: no reasoning")
    separate_reasoning: bool = given(Boolean(), "reasoning apart from content", default=True)
    stream_reasoning: bool = given(Boolean(), "reasoning as it comes", default=True)
    include_reasoning: bool = given(Boolean(), "tell the reasoning at all", default=True)
    chat_template_kwargs: dict[str, Any] | None = given(Object(), "values for the chat template")
    continue_final_message: bool = given(
        Boolean(), "go on with the last message, the assistant's", default=False
    )
    add_generation_prompt: bool | None = given(Boolean(), "false: the prompt ends with a message")

    functions: None = refused("use 'tools'")
    function_call: None = refused("use 'tool_choice'")
    modalities: None = refused("this server writes text", harmless=(["text"],))
    audio: None = refused("this server writes text")
    web_search_options: None = refused("give the model a tool that searches")
    documents: None = refused("put them into a message")
    chat_template: None = refused(ONE_TEMPLATE)
    echo: None = refused("use /v1/completions")
    best_of: None = refused("ask for 'n' answers and choose", harmless=(1,))
    suffix: None = refused("this server does not fill in the middle")
    add_special_tokens: None = refused("the chat template writes them")
    input_ids: None = refused("use /v1/completions with token ids")
    mm_processor_kwargs: None = refused("images are prepared as the model was trained")

    prediction: None = ignored("it could only make an answer come sooner")
    verbosity: None = ignored("say it in a message")
    moderation: None = ignored("this server moderates nothing")


def _prompts(value: Any, path: str) -> tuple[Prompt, ...]:
    """The four spellings: a string, strings, token ids, lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        refuse(path, "must be a string or an array that is not empty", "invalid_type")
    if not isinstance(value[0], str | list):
        return (TokenIds().read(value, path),)
    if len(value) > MAX_PROMPTS:
        refuse(path, f"must have at most {MAX_PROMPTS} prompts")
    return tuple(_prompt(item, path) for item in value)


def _prompt(item: Any, path: str) -> Prompt:
    if isinstance(item, str):
        return item
    if not isinstance(item, list) or not item:
        refuse(path, "must hold strings, or arrays of token ids that are not empty", "invalid_type")
    return TokenIds().read(item, path)


def _prompts_told() -> Mapping[str, Any]:
    ids = {**TokenIds().schema(), "minItems": 1}
    one = {"anyOf": [{"type": "string"}, ids]}
    some = {"type": "array", "items": one, "minItems": 1, "maxItems": MAX_PROMPTS}
    return {"anyOf": [{"type": "string"}, ids, some]}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBody(StreamedFields):
    """POST /v1/completions."""

    prompt: tuple[Prompt, ...] = given(
        Told(_prompts, _prompts_told()),
        "a string, token ids, or an array of these",
        required=True,
    )
    max_tokens: int | None = given(Integer(0), "most tokens of each answer; absent: 16")
    logprobs: int | None = given(Integer(0, MAX_LOGPROBS), "tell so many likeliest tokens")
    echo: bool = given(Boolean(), "answers begin with their prompts", default=False)
    best_of: int | None = given(Integer(1, MAX_CHOICES), "only if it equals 'n'")

    suffix: None = refused("this server does not fill in the middle")
    add_special_tokens: None = refused("send token ids", harmless=(True,))
    prompt_embeds: None = refused("send text or token ids")


def parse_chat(value: dict[str, Any], *, model: str, vocab_size: int) -> ChatRequest:
    """Read the body of POST /v1/chat/completions; raises ApiError."""
    body = read(ChatBody, value)
    check_model(body.model, model)
    use = use_tools(body.tools, body.tool_choice)
    limit = body.max_completion_tokens or body.max_tokens
    return ChatRequest(
        options=_options(body, limit, _chat_logprobs(body), vocab_size),
        messages=template_messages(body.messages),
        images=image_sources(body.messages),
        tools=use.tools,
        parallel_tool_calls=body.parallel_tool_calls and not use.one_call,
        forced_calls=use.forced_calls,
        reasoning=_reasoning_view(body),
        continues=_continues(body),
        generation_prompt=body.add_generation_prompt is not False,
        template_kwargs=template_kwargs(body.chat_template_kwargs, body.reasoning_effort),
    )


def parse_text(value: dict[str, Any], *, model: str, vocab_size: int) -> TextRequest:
    """Read the body of POST /v1/completions; raises ApiError."""
    body = read(TextBody, value)
    check_model(body.model, model)
    if body.best_of not in (None, body.n):
        refuse("best_of", "is not supported: leave it out or make it equal to 'n'")
    for prompt in body.prompt:
        if isinstance(prompt, tuple):
            check_ids(prompt, vocab_size=vocab_size, path="prompt")
    options = _options(body, body.max_tokens, body.logprobs, vocab_size)
    return TextRequest(options=options, prompts=body.prompt, echo=body.echo)


def _options(
    body: StreamedFields, max_tokens: int | None, logprobs: int | None, vocab_size: int
) -> Options:
    told = body.stream_options
    if told is not None and not body.stream:
        refuse("stream_options", "is only allowed when 'stream' is true", None)
    return replace(
        sampling_options(body, vocab_size=vocab_size),
        stream=body.stream,
        include_usage=told is not None and told.include_usage,
        continuous_usage=told is not None and told.continuous_usage_stats,
        max_tokens=max_tokens,
        logprobs=logprobs,
        form=read_form(body),
    )


def _chat_logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        refuse("top_logprobs", "is only allowed when 'logprobs' is true", None)
    return (body.top_logprobs or 0) if body.logprobs else None


def _reasoning_view(body: ChatBody) -> ReasoningView:
    if not body.include_reasoning:
        return ReasoningView.HIDDEN
    if not body.separate_reasoning:
        return ReasoningView.IN_TEXT
    return ReasoningView.STREAMED if body.stream_reasoning else ReasoningView.AT_ONCE


def _continues(body: ChatBody) -> bool:
    if not body.continue_final_message:
        return False
    if body.add_generation_prompt:
        refuse("continue_final_message", "excludes 'add_generation_prompt': give one of them")
    return goes_on(body.messages)
