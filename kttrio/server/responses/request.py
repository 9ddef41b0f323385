"""What OpenAI clients may ask of /v1/responses: the body, read and checked.

Its input items are read in input.py. The server keeps nothing: whatever a response
depends on comes with its request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from kttrio.server.asking.forms import (
    GuidedFields,
    NamedSchema,
    ObjectFormat,
    TextFormat,
    read_form,
    schema_form,
)
from kttrio.server.asking.sampling import MAX_LOGPROBS, sampling_options
from kttrio.server.asking.thinking import EFFORTS, template_kwargs
from kttrio.server.errors import check_model
from kttrio.server.requests import ChatRequest, Options
from kttrio.server.responses.input import INPUT, Input, image_sources, template_messages
from kttrio.server.responses.output import write_json
from kttrio.server.responses.tools import (
    TOOL_CHOICE,
    TOOLS,
    ToolChoice,
    chat_tool,
    served_functions,
    use_tools,
)
from kttrio.server.schema.kinds import (
    Boolean,
    Integer,
    Many,
    Object,
    OneOf,
    Tagged,
    Text,
    Told,
    check_type,
    refuse,
)
from kttrio.server.schema.records import Nested, given, ignored, read, refused
from kttrio.text.grammar import Form

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
"""The second is always told, and the others come with tools that this server does not run."""
UNSAID = MappingProxyType({"description": None, "parameters": None, "strict": None})
"""What a function is told back with where its request says nothing."""
SUMMARIES = ("auto", "concise", "detailed")
STATELESS = "nothing is stored, send the whole history as 'input'"
TEXT_FORMAT = "use 'text' with a 'format'"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningFields:
    """How the model reasons, and how that is told."""

    effort: str | None = given(OneOf(EFFORTS), "for the template; none: no reasoning")
    summary: str | None = given(
        OneOf(SUMMARIES), "reasoning comes as its own summary, in full: nobody sums it up"
    )
    generate_summary: str | None = given(OneOf(SUMMARIES), "the same in older words")
    context: None = refused("the chat template chooses what it shows", harmless=("auto",))
    mode: None = refused("there is one", harmless=("standard",))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFields:
    """What the text is like."""

    format: TextFormat | ObjectFormat | NamedSchema | None = given(
        Tagged(
            "type",
            {
                "text": Nested(TextFormat),
                "json_object": Nested(ObjectFormat),
                "json_schema": Nested(NamedSchema),
            },
        ),
        "text, json_object or json_schema",
    )
    verbosity: None = ignored("say it in a message")


def _metadata(value: Any, path: str) -> dict[str, str]:
    check_type(value, dict, "an object", path)
    return {name: Text().read(entry, f"{path}.{name}") for name, entry in value.items()}


METADATA = Told(_metadata, {"type": "object", "additionalProperties": {"type": "string"}})


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesBody(GuidedFields):
    """POST /v1/responses."""

    model: str | None = given(Text(), "the one that is served; absent: the same")
    input: Input = given(INPUT, "a string, or items", required=True)
    instructions: str | None = given(Text(), "the system's message")
    stream: bool = given(Boolean(), "answer in server-sent events", default=False)
    max_output_tokens: int | None = given(Integer(1), "most tokens of the answer")
    tools: tuple[dict[str, Any], ...] = given(
        TOOLS,
        "functions that the model may call; other types are skipped",
        default=(),
    )
    tool_choice: ToolChoice | None = given(
        TOOL_CHOICE, "auto, none, required, a function, or allowed_tools"
    )
    parallel_tool_calls: bool = given(Boolean(), "more than one call", default=True)
    reasoning: ReasoningFields | None = given(Nested(ReasoningFields), "effort and summary")
    text: TextFields | None = given(Nested(TextFields), "the form of the answer")
    include: tuple[str, ...] = given(
        Many(OneOf(INCLUDABLE)), f"{LOGPROBS}: tell the log-probabilities", default=()
    )
    top_logprobs: int | None = given(
        Integer(0, MAX_LOGPROBS), "tell so many likeliest tokens; above 0 without 'include', too"
    )
    truncation: str | None = given(
        OneOf(("auto", "disabled")), "nothing is ever dropped: what does not fit is an error"
    )
    metadata: dict[str, str] | None = given(  # type: ignore[assignment]  # ignored elsewhere
        METADATA, "told back, and not stored"
    )
    n: int = given(Integer(1, 1), "there is one answer", default=1)
    chat_template_kwargs: dict[str, Any] | None = given(Object(), "values for the chat template")

    previous_response_id: None = refused(STATELESS)
    conversation: None = refused(STATELESS)
    prompt: None = refused("no prompts are stored, send 'instructions' and 'input'")
    background: None = refused("wait for the answer, or stream it")
    context_management: None = refused("shorten the history before you send it")
    max_tokens: None = refused("use 'max_output_tokens'")
    max_completion_tokens: None = refused("use 'max_output_tokens'")
    reasoning_effort: None = refused("use 'reasoning' with an 'effort'")
    response_format: None = refused(TEXT_FORMAT)
    logprobs: None = refused(f"use 'include' with '{LOGPROBS}'")
    return_token_ids: None = refused(  # type: ignore[assignment]  # served elsewhere
        "use /v1/chat/completions"
    )

    store: None = ignored("nothing is stored, and the response says so: 'store' is false")
    stream_options: None = ignored("events are never padded, and the last one has the usage")
    max_tool_calls: None = ignored("it limits tools that the server runs: there are none")
    client_metadata: None = ignored("answers do not depend on who asks")
    moderation: None = ignored("this server moderates nothing")
    prompt_cache_options: None = ignored("requests share no cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedResponse:
    """A response as it was asked for."""

    chat: ChatRequest
    summarize: bool
    """Reasoning is told as a summary."""
    echo: str
    """What the response repeats of its request: a JSON object."""


def parse_response(value: dict[str, Any], *, model: str, vocab_size: int) -> AskedResponse:
    """Read the body of POST /v1/responses, or of its /input_tokens; raises ApiError."""
    body = read(ResponsesBody, value)
    check_model(body.model, model)
    functions = served_functions(body.tools)
    use = use_tools(list(map(chat_tool, functions)), body.tool_choice)
    thinks = body.reasoning or ReasoningFields()
    chat = ChatRequest(
        options=_options(body, vocab_size),
        messages=_instructed(template_messages(body.input), body.instructions),
        images=tuple(image_sources(body.input)),
        tools=use.tools,
        parallel_tool_calls=body.parallel_tool_calls and not use.one_call,
        forced_calls=use.forced_calls,
        template_kwargs=template_kwargs(body.chat_template_kwargs, thinks.effort),
    )
    written = write_json(_echo(body, value, functions))
    summarize = (thinks.summary or thinks.generate_summary) is not None
    return AskedResponse(chat=chat, summarize=summarize, echo=written)


def _instructed(messages: list[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """The messages, with all that is said to the system before they begin in one of them: agents
    send several, and there are templates that refuse or lose all but the first."""
    system = [{"role": "system", "content": instructions}] if instructions else []
    system += takewhile(_is_systems, messages)
    rest = messages[len(system) - bool(instructions) :]
    if len(system) > 1:
        text = "\n\n".join(message["content"] for message in system)
        system = [{"role": "system", "content": text}]
    return system + rest


def _is_systems(message: dict[str, Any]) -> bool:
    return message["role"] in ("system", "developer") and isinstance(message["content"], str)


def _options(body: ResponsesBody, vocab_size: int) -> Options:
    scored = bool(body.top_logprobs) or LOGPROBS in body.include
    return replace(
        sampling_options(body, vocab_size=vocab_size),
        stream=body.stream,
        max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if scored else None,
        form=_form(body),
    )


def _form(body: ResponsesBody) -> Form | None:
    wanted = body.text and body.text.format
    elsewhere = read_form(body)
    if wanted is None or isinstance(wanted, TextFormat):
        return elsewhere
    if elsewhere is not None:
        refuse(elsewhere.field, "is a second form of the answer beside 'text.format'")
    if isinstance(wanted, NamedSchema):
        return schema_form(wanted.schema, "text.format.schema")
    return Form("json_object", "", "text.format")


def _echo(
    body: ResponsesBody, value: dict[str, Any], functions: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    reasoning, text = value.get("reasoning") or {}, value.get("text") or {}
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None, **reasoning},
        "service_tier": "default",
        "store": False,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": value.get("tool_choice") or "auto",
        "tools": [{**UNSAID, **tool} for tool in functions],
        "top_logprobs": body.top_logprobs or 0,
        "truncation": "disabled",
        "user": value.get("user"),
    }
