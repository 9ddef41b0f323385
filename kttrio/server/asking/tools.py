"""Tools in any protocol: what a choice among them comes to, and the calls of the past.

A tool is read in its protocol's words, and is here as OpenAI's chats have it: so templates take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kttrio.server.schema.kinds import Object, Text, Told, refuse
from kttrio.server.schema.records import given
from kttrio.text.messages import Arguments, read_arguments

Tool = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldFunction:
    """What the model is told of a function."""

    name: str = given(Text(1), "of the function", required=True)
    description: str | None = given(Text(), "what it does")
    parameters: dict[str, Any] | None = given(Object(), "JSON Schema of its arguments")


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionName:
    """A function by its name."""

    name: str = given(Text(1), "of the function", required=True)


def _past_arguments(value: Any, path: str) -> Arguments:
    try:
        return read_arguments(value)
    except ValueError as error:
        refuse(path, str(error))


@dataclass(frozen=True, slots=True, kw_only=True)
class PastFunction:
    """What was called."""

    name: str = given(Text(1), "of the function", required=True)
    arguments: Arguments | None = given(
        Told(_past_arguments, {"type": ["string", "object"]}), "a JSON object or its text"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a choice comes to."""

    tools: list[Tool]
    """Those that the model is told of."""
    forced_calls: tuple[str, ...] = ()
    """Names, one of which must be called; none: as the model likes."""
    one_call: bool = False
    """The choice means a single call."""


def force(
    tools: Sequence[Tool], names: tuple[str, ...], path: str, *, one_call: bool = False
) -> ToolUse:
    """The answer must be a call of one of `names`; `path` is blamed where there is no such tool."""
    if not names:
        refuse(path, "needs 'tools' to choose from")
    _check_names(tools, names, path)
    return ToolUse(tools=list(tools), forced_calls=names, one_call=one_call)


def allow(tools: Sequence[Tool], names: tuple[str, ...], path: str, *, must_call: bool) -> ToolUse:
    """The model is told of the tools in `names` alone, so that it calls no others."""
    _check_names(tools, names, path)
    told = [tool for tool in tools if tool_name(tool) in names]
    return ToolUse(tools=told, forced_calls=names if must_call else ())


def _check_names(tools: Sequence[Tool], names: Sequence[str], path: str) -> None:
    known = set(map(tool_name, tools))
    for name in names:
        if name not in known:
            refuse(path, f"has '{name[:80]}', which is none of the 'tools'")


def tool_name(tool: Tool) -> str:
    return str(tool["function"]["name"])
