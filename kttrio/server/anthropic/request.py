"""What Anthropic's clients may ask: the bodies of /v1/messages and its count of tokens.

Messages are read in messages.py, tools in tools.py. Nothing is generated here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kttrio.server.anthropic.blocks import MESSAGES, SYSTEM, Blocks, Message
from kttrio.server.anthropic.messages import has_late_system, read_chat
from kttrio.server.anthropic.tools import (
    TOOL_CHOICE,
    TOOLS,
    AutoChoice,
    CustomTool,
    ToolChoice,
    use_tools,
)
from kttrio.server.asking.sampling import MAX_STOPS
from kttrio.server.asking.thinking import SWITCHES
from kttrio.server.errors import ApiError
from kttrio.server.requests import ChatRequest, Options
from kttrio.server.schema.kinds import (
    Boolean,
    Integer,
    Many,
    Number,
    Object,
    OneOf,
    Tagged,
    Text,
    refuse,
)
from kttrio.server.schema.records import Nested, given, ignored, refused
from kttrio.server.served_model import ServedModel
from kttrio.text.chats import knows_late_system, knows_switches
from kttrio.text.grammar import Form

EFFORTS = ("low", "medium", "high", "xhigh", "max")
CLAUDE = "claude-"
"""How the names begin that agents ask for when nobody told them another."""
NO_THREADS = "this server keeps no conversations; send all messages"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingOn:
    """The model thinks first, where it knows how to."""

    display: str = given(
        OneOf(("summarized", "omitted", "updates")),
        "omitted: reasoning is not shown; else all of it is, as it is written",
        default="summarized",
    )
    budget_tokens: None = ignored("the model knows no budget: it ends its thinking itself")
    block_binding: None = ignored("blocks of reasoning are not bound to a conversation")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingOff:
    """The model answers at once, where it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonFormat:
    """The answer is JSON of this schema."""

    schema: dict[str, Any] = given(Object(), "JSON Schema", required=True)


FORMAT = Tagged("type", {"json_schema": Nested(JsonFormat)})


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """How much effort an answer is worth, and what it must look like."""

    effort: str | None = given(OneOf(EFFORTS), "for models whose chat template knows efforts")
    format: JsonFormat | None = given(FORMAT, "the answer is JSON of a schema")
    task_budget: None = refused("the model knows no budget but 'max_tokens'")


@dataclass(frozen=True, slots=True, kw_only=True)
class CountBody:
    """The body of POST /v1/messages/count_tokens: a conversation."""

    model: str | None = given(
        Text(1), "the served model, or any name that begins with 'claude-' for it"
    )
    messages: tuple[Message, ...] = given(MESSAGES, "the conversation", required=True)
    system: str | Blocks = given(SYSTEM, "the system prompt", default="")
    tools: tuple[CustomTool, ...] = given(
        TOOLS,
        "tools that the model may call",
        default=(),
    )
    tool_choice: ToolChoice = given(
        TOOL_CHOICE,
        "whether the model calls tools, and which",
        default=AutoChoice(),
    )
    thinking: ThinkingOn | ThinkingOff | None = given(
        Tagged(
            "type",
            {
                "enabled": Nested(ThinkingOn),
                "adaptive": Nested(ThinkingOn),
                "disabled": Nested(ThinkingOff),
            },
        ),
        "whether the model thinks first; where nothing is said it does not, if it can help it",
    )
    output_config: OutputConfig = given(
        Nested(OutputConfig), "effort and format", default=OutputConfig()
    )
    output_format: JsonFormat | None = given(FORMAT, "older name of 'output_config.format'")
    cache_control: None = ignored("nothing is billed, so there is nothing to mark")
    context_management: None = ignored("the conversation is answered as it is sent")
    compaction: None = refused("ask for a summary in a message of your own")
    thread: None = refused(NO_THREADS)
    mcp_servers: None = refused("this server calls no others; run the tools yourself")
    speed: None = ignored("there is but one speed")
    user_profile_id: None = ignored("nothing is billed")


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagesBody(CountBody):
    """The body of POST /v1/messages."""

    max_tokens: int = given(
        Integer(1), "the most tokens to generate, as far as the context has room", required=True
    )
    stream: bool = given(Boolean(), "send events as the answer is written", default=False)
    stop_sequences: tuple[str, ...] = given(
        Many(Text(1), most=MAX_STOPS), "texts that end the answer before them", default=()
    )
    temperature: float | None = given(Number(0, 1), "0: the most probable token, always")
    top_p: float | None = given(Number(0, 1, above=True), "nucleus sampling")
    top_k: int | None = given(Integer(0, 2**31 - 1), "the most probable tokens; 0: all of them")
    metadata: None = ignored("nothing is kept about users")
    service_tier: None = ignored("there is but one tier")
    container: None = refused("this server runs no code; run the tools yourself")
    inference_geo: None = ignored("there is but one place")
    billing_policy: None = ignored("nothing is billed")
    diagnostics: None = ignored("nothing is cached that could be missed")
    fallbacks: None = ignored("no other model is ever asked")
    fallback_credit_token: None = ignored("nothing is billed")


def check_model(name: str | None, served: str) -> None:
    """Agents ask for Anthropic's models by themselves; those names mean the one that is served."""
    if name is None or name == served or name.startswith(CLAUDE):
        return
    message = (
        f"The model '{name[:200]}' does not exist; this server has '{served}', for which any name "
        f"that begins with '{CLAUDE}' stands too."
    )
    raise ApiError(404, message, param="model", code="model_not_found")


def to_answer(body: MessagesBody, model: ServedModel) -> ChatRequest:
    """The chat to be answered. Raises ApiError."""
    options = Options(
        stream=body.stream,
        max_tokens=body.max_tokens,
        fit_context=True,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
        form=_form(body),
    )
    asked = _chat(body, model, options)
    if asked.messages[-1:] and asked.messages[-1]["role"] == "assistant" and not asked.continues:
        place = f"messages[{len(body.messages) - 1}].content"
        refuse(place, "is an answer that cannot go on: end with text, or with a user's message")
    return asked


def to_count(body: CountBody, model: ServedModel) -> ChatRequest:
    """The chat whose tokens are counted. Raises ApiError."""
    return _chat(body, model, Options())


def _chat(body: CountBody, model: ServedModel, options: Options) -> ChatRequest:
    check_model(body.model, model.name)
    use = use_tools(body.tools, body.tool_choice)
    chat = read_chat(body.system, body.messages, late_system=_late_system(body, model))
    return ChatRequest(
        options=options,
        messages=chat.messages,
        images=tuple(chat.images),
        tools=use.tools,
        parallel_tool_calls=not use.one_call,
        forced_calls=use.forced_calls,
        continues=_is_begun(chat.messages),
        template_kwargs=_template_kwargs(body, model),
    )


def _late_system(body: CountBody, model: ServedModel) -> bool:
    """Whether system messages stay where they stand amid the chat."""
    template = model.template
    return template is not None and has_late_system(body.messages) and knows_late_system(template)


def _is_begun(chat: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the chat ends with text of the model, which then goes on with it."""
    last = chat[-1] if chat else {"role": "system"}
    return last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last


def _form(body: CountBody) -> Form | None:
    new, old = body.output_config.format, body.output_format
    if new is not None and old is not None:
        refuse("output_format", "must not be given beside 'output_config.format'")
    field = "output_config.format.schema" if new else "output_format.schema"
    wanted = new or old
    return Form("json_schema", json.dumps(wanted.schema), field) if wanted else None


def _template_kwargs(body: CountBody, model: ServedModel) -> dict[str, Any]:
    switches = dict.fromkeys(SWITCHES, isinstance(body.thinking, ThinkingOn))
    if body.thinking is None and not (model.template and knows_switches(model.template, switches)):
        switches = {}  # a model that always thinks does so unless it is told not to
    effort = body.output_config.effort
    return switches if effort is None else {**switches, "reasoning_effort": effort}
