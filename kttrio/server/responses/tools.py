"""The tools of a response, and which of them it may or must call.

Functions are served, as in chats; tools that a server would run itself are skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kttrio.server.asking.tools import FunctionName, ToldFunction, ToolUse, allow, force, tool_name
from kttrio.server.schema.kinds import (
    Boolean,
    Either,
    Many,
    OneOf,
    Tagged,
    Text,
    Told,
    check_type,
)
from kttrio.server.schema.records import Checked, Nested, given

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionTool(ToldFunction):
    """A function that the client runs."""

    strict: bool | None = given(Boolean(), "forced calls follow the schema with or without it")


FUNCTION = Checked(FunctionTool)


def _tool(value: Any, path: str) -> dict[str, Any]:
    """A function is checked; any other tool only needs a type to be skipped by."""
    check_type(value, dict, "an object", path)
    named = Text(1).read(value.get("type"), f"{path}.type")
    return FUNCTION.read(value, path) if named == "function" else dict(value)


def _tool_told() -> Mapping[str, Any]:
    function = Tagged("type", {"function": FUNCTION}).schema()
    other = {"type": "string", "minLength": 1, "not": {"const": "function"}}
    skipped = {"type": "object", "properties": {"type": other}, "required": ["type"]}
    return {"anyOf": [function, skipped]}


TOOLS = Many(Told(_tool, _tool_told()))


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedTools:
    """Some of the tools."""

    mode: str = given(OneOf(("auto", "required")), "whether one must be called", required=True)
    tools: tuple[FunctionName, ...] = given(
        Many(Tagged("type", {"function": Nested(FunctionName)}), least=1), "which", required=True
    )


TOOL_CHOICE = Either(
    {
        str: OneOf(("auto", "none", "required")),
        dict: Tagged(
            "type", {"function": Nested(FunctionName), "allowed_tools": Nested(AllowedTools)}
        ),
    }
)
ToolChoice = str | FunctionName | AllowedTools


def served_functions(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools that are served."""
    skipped = sorted({tool["type"] for tool in tools if tool["type"] != "function"})
    if skipped:
        logger.debug("tools of these types are skipped: %s", ", ".join(skipped))
    return [tool for tool in tools if tool["type"] == "function"]


def chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """As chats have it, with no more than models were taught to read."""
    told = ("name", "description", "parameters")
    function = {name: tool[name] for name in told if tool.get(name) is not None}
    return {"type": "function", "function": function}


def use_tools(tools: list[dict[str, Any]], choice: ToolChoice | None) -> ToolUse:
    """What `choice` means for these tools, as chats have them. Raises BadRequestError."""
    if isinstance(choice, FunctionName):
        return force(tools, (choice.name,), "tool_choice.name", one_call=True)
    if isinstance(choice, AllowedTools):
        names = tuple(tool.name for tool in choice.tools)
        return allow(tools, names, "tool_choice.tools", must_call=choice.mode == "required")
    if choice == "required":
        return force(tools, tuple(map(tool_name, tools)), "tool_choice")
    return ToolUse(tools=[] if choice == "none" else tools)
