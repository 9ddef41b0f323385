"""The tools of OpenAI's chats, and which of them an answer may or must call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kttrio.server.asking.tools import (
    FunctionName,
    ToldFunction,
    Tool,
    ToolUse,
    allow,
    force,
    tool_name,
)
from kttrio.server.schema.kinds import Either, Many, OneOf, Tagged
from kttrio.server.schema.records import Checked, Nested, given, ignored


@dataclass(frozen=True, slots=True, kw_only=True)
class Function(ToldFunction):
    """A function of a chat."""

    strict: None = ignored("forced calls always follow the schema")


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionTool:
    """A tool that the client runs."""

    function: Tool = given(Checked(Function), "the function", required=True)


TOOLS = Many(Tagged("type", {"function": Checked(FunctionTool)}))


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTool:
    """A tool by its function's name."""

    function: FunctionName = given(Nested(FunctionName), "the function", required=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedTools:
    """Some of the tools."""

    mode: str = given(OneOf(("auto", "required")), "whether one must be called", required=True)
    tools: tuple[NamedTool, ...] = given(
        Many(Tagged("type", {"function": Nested(NamedTool)}), least=1), "which", required=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedChoice:
    """A choice among some of the tools."""

    allowed_tools: AllowedTools = given(Nested(AllowedTools), "mode and tools", required=True)


TOOL_CHOICE = Either(
    {
        str: OneOf(("auto", "none", "required")),
        dict: Tagged(
            "type", {"function": Nested(NamedTool), "allowed_tools": Nested(AllowedChoice)}
        ),
    }
)
ToolChoice = str | NamedTool | AllowedChoice


def use_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> ToolUse:
    """What `choice`, as OpenAI's chats have it, means for these tools. Raises BadRequestError."""
    if isinstance(choice, NamedTool):
        name = choice.function.name
        return force(tools, (name,), "tool_choice.function.name", one_call=True)
    if isinstance(choice, AllowedChoice):
        chosen = choice.allowed_tools
        names = tuple(tool.function.name for tool in chosen.tools)
        path = "tool_choice.allowed_tools.tools"
        return allow(tools, names, path, must_call=chosen.mode == "required")
    if choice == "required":
        return force(tools, tuple(map(tool_name, tools)), "tool_choice")
    return ToolUse(tools=[] if choice == "none" else list(tools))
