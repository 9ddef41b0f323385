"""Tool calls as Kimi-K2 writes them.

    <|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:NUMBER
    <|tool_call_argument_begin|>{...}<|tool_call_end|><|tool_calls_section_end|>

(in one line). NUMBER counts over the whole chat. The model's own id is the call's id, as the
chat template shows it to the model again; a changed one leads it astray.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from kttrio.text.call_lark import CallShape, JsonArguments
from kttrio.text.json_calls import Head, HeadedCall, JsonCalls, Tags
from kttrio.text.tool_parsers.base import ToolParser, Tools
from kttrio.text.tool_schema import function_names

_SECTION, _SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_ONE, _ONE_END = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"
_CALL, _CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
_SEPARATOR = "<|tool_call_argument_begin|>"
_DECLARATION = "<|im_system|>tool_declare"
_TAGS = Tags(
    wrappers=(_SECTION, _ONE),
    begin=_CALL,
    closings=(_CALL_END, _SECTION_END, _ONE_END),
    ends=(_CALL_END, _SECTION_END, _ONE_END, _CALL, _SECTION, _ONE),
)
_HEAD = re.compile(rf"\s*([^\s<>]+)\s*{re.escape(_SEPARATOR)}\s*")
_ID = re.compile(r"(?:functions\.)?(.+?)(:[0-9]+)?")
_MANGLED_ID = re.compile(r"functions[._]?(.+?)[:_]?[0-9]*")


SHAPE = CallShape(
    begin=_SECTION,
    open=_CALL + "functions.{name}:{number}" + _SEPARATOR,
    close=_CALL_END,
    end=_SECTION_END,
    arguments=JsonArguments(),
)


def detects(template_text: str) -> bool:
    """The first template that was published shows the tools, but forgets past calls."""
    return _SEPARATOR in template_text or _DECLARATION in template_text


def open_parser(tools: Tools, new_id: Callable[[], str]) -> ToolParser:
    heads = _Heads(function_names(tools), new_id)
    return JsonCalls(_TAGS, lambda pieces: HeadedCall(pieces, _TAGS.ends, heads.read))


class _Heads:
    """Names and ids of one answer's calls. No id is given twice, whatever the model writes."""

    def __init__(self, names: frozenset[str], new_id: Callable[[], str]) -> None:
        self._names = names
        self._new_id = new_id
        self._given: set[str] = set()

    def read(self, text: str) -> Head | None:
        head = _HEAD.fullmatch(text)
        parts = _ID.fullmatch(head[1]) if head else None
        if not head or not parts:
            return None
        id, name, number = head[1], parts[1], parts[2]
        if name not in self._names:
            name = self._unmangled(id) or name
        if number is None or id in self._given:
            id = self._new_id()
        self._given.add(id)
        return Head(name, id)

    def _unmangled(self, id: str) -> str | None:
        """The tool that is meant by an id without its `.` or `:`, as models write it that were
        shown such ids: clients that allow no punctuation in ids replace or drop it."""
        parts = _MANGLED_ID.fullmatch(id)
        return parts[1] if parts and parts[1] in self._names else None
