"""The tools of OpenAI's chats, and which of them an answer may or must call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kttrio.server.schema.kinds import Either, Many, Object, OneOf, Tagged, Text, refuse
from kttrio.server.schema.records import Checked, Nested, given, ignored

Tool = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """What the model is told of a function."""

    name: str = given(Text(1), "of the function", required=True)
    description: str | None = given(Text(), "what it does")
    parameters: dict[str, Any] | None = given(Object(), "JSON Schema of its arguments")
    strict: None = ignored("forced calls always follow the schema")


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionTool:
    """A tool that the client runs."""

    function: Tool = given(Checked(Function), "the function", required=True)


TOOLS = Many(Tagged("type", {"function": Checked(FunctionTool)}))


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionName:
    """A function by its name."""

    name: str = given(Text(1), "of the function", required=True)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a choice comes to."""

    tools: list[Tool]
    """Those that the model is told of."""
    forced_calls: tuple[str, ...] = ()
    """Names, one of which must be called; none: as the model likes."""
    one_call: bool = False
    """The choice means a single call."""


def use_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> ToolUse:
    """What `choice`, as OpenAI's chats have it, means for these tools. Raises BadRequestError."""
    if isinstance(choice, NamedTool):
        name = choice.function.name
        return force(tools, (name,), "tool_choice.function.name", one_call=True)
    if isinstance(choice, AllowedChoice):
        return _allowed(tools, choice.allowed_tools)
    if choice == "required":
        return force(tools, tuple(map(tool_name, tools)), "tool_choice")
    return ToolUse(tools=[] if choice == "none" else list(tools))


def force(
    tools: Sequence[Tool], names: tuple[str, ...], path: str, *, one_call: bool = False
) -> ToolUse:
    """The answer must be a call of one of `names`; `path` is blamed where there is no such tool."""
    if not names:
        refuse(path, "needs 'tools' to choose from")
    _check_names(tools, names, path)
    return ToolUse(tools=list(tools), forced_calls=names, one_call=one_call)


def _allowed(tools: Sequence[Tool], choice: AllowedTools) -> ToolUse:
    """The model is told of no others, so that it calls none of them."""
    names = tuple(tool.function.name for tool in choice.tools)
    _check_names(tools, names, "tool_choice.allowed_tools.tools")
    told = [tool for tool in tools if tool_name(tool) in names]
    return ToolUse(tools=told, forced_calls=names if choice.mode == "required" else ())


def _check_names(tools: Sequence[Tool], names: Sequence[str], path: str) -> None:
    known = set(map(tool_name, tools))
    for name in names:
        if name not in known:
            refuse(path, f"has '{name[:80]}', which is none of the 'tools'")


def tool_name(tool: Tool) -> str:
    return str(tool["function"]["name"])
