"""The tools of Anthropic's chats, and which of them an answer may or must call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kttrio.server.asking.tools import ToolUse, force
from kttrio.server.schema.kinds import Boolean, Many, Object, Tagged, Text
from kttrio.server.schema.records import Nested, given, ignored, refused


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomTool:
    """A tool that the client runs."""

    name: str = given(Text(1), "what the model calls it", required=True)
    input_schema: dict[str, Any] = given(Object(), "JSON Schema of its input", required=True)
    description: str | None = given(Text(), "what it does")
    strict: None = ignored("calls are held to the schema where they are forced, and only there")
    cache_control: None = ignored("nothing is billed, so there is nothing to mark")
    defer_loading: None = ignored("the model knows all tools from the beginning")
    eager_input_streaming: None = ignored("input is always sent as it is written")
    allowed_callers: None = ignored("the model is the only caller")
    input_examples: None = refused("tell them in the 'description'")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyCalls:
    """How many calls there may be."""

    disable_parallel_tool_use: bool = given(Boolean(), "one call at most", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoChoice(AnyCalls):
    """The model calls tools as it likes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyChoice(AnyCalls):
    """The answer is a call of some tool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedChoice(AnyCalls):
    """The answer is a call of this tool."""

    name: str = given(Text(1), "one of the tools", required=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoChoice:
    """The answer has no calls."""


TOOLS = Many(
    Tagged(
        "type",
        {"custom": Nested(CustomTool)},
        default="custom",
        mend="this server runs no tools; give one of your own, with its 'input_schema'",
    )
)
TOOL_CHOICE = Tagged(
    "type",
    {
        "auto": Nested(AutoChoice),
        "any": Nested(AnyChoice),
        "tool": Nested(NamedChoice),
        "none": Nested(NoChoice),
    },
)
ToolChoice = AutoChoice | AnyChoice | NamedChoice | NoChoice


def use_tools(tools: Sequence[CustomTool], choice: ToolChoice) -> ToolUse:
    """What `choice` means for these tools. Raises BadRequestError."""
    told = list(map(_told, tools))
    if isinstance(choice, NoChoice):
        return ToolUse(tools=[])
    one_call = choice.disable_parallel_tool_use
    if isinstance(choice, NamedChoice):
        return force(told, (choice.name,), "tool_choice.name", one_call=one_call)
    if isinstance(choice, AnyChoice):
        names = tuple(tool.name for tool in tools)
        return force(told, names, "tool_choice", one_call=one_call)
    return ToolUse(tools=told, one_call=one_call)


def _told(tool: CustomTool) -> dict[str, Any]:
    """The tool as chat templates take it."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": {**function, "parameters": tool.input_schema}}
