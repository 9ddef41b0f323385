"""Tool calls as GLM-4.5 to 4.7 and GLM-5 write them: keys and values in tags of their own.

    <tool_call>NAME
    <arg_key>KEY</arg_key>
    <arg_value>VALUE</arg_value>
    </tool_call>

From 4.7 on without the newlines. Values are plain text, or JSON where the tool's schema asks for
another type. A name has no tag: it is one where an argument or the end of the call follows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from kttrio.text.call_grammar import MAX_NAME, Grammar, Header, Tag
from kttrio.text.call_lark import CallShape, TaggedArguments
from kttrio.text.markers import follows
from kttrio.text.tagged_calls import TaggedCallParser
from kttrio.text.tool_parsers.base import ToolParser, Tools

_CALL = Tag("<tool_call>", "</tool_call>")
_ARGUMENT = Tag("<arg_key>", "</arg_value>")
_KEY_END, _VALUE = "</arg_key>", "<arg_value>"
_NAME = re.compile(rf"\s*([^\s<>]{{1,{MAX_NAME}}})")
_KEY = re.compile(rf"[^<>\n]{{1,{MAX_NAME}}}")


def _read_name(text: str, start: int) -> Header | None:
    match = _NAME.match(text, start)
    if match is None:
        return Header("", start) if text[start:].strip() else None
    fits = follows(text[match.end() :], (_ARGUMENT.open, _CALL.close))
    return None if fits is None else Header(match[1] if fits else "", match.end())


def _read_key(text: str, start: int) -> Header | None:
    """Up to the value."""
    match = _KEY.match(text, start)
    if match is None:
        return Header("", start) if text[start:] else None
    end = match.end()
    for tag in (_KEY_END, _VALUE):
        fits = follows(text[end:], (tag,))
        if not fits:
            return None if fits is None else Header("", start)
        end = text.index(tag, end) + len(tag)
    return Header(match[0].strip(), end)


_GRAMMAR = Grammar(
    call=_CALL,
    argument=_ARGUMENT,
    read_call=_read_name,
    read_argument=_read_key,
    separator="\n",
)


SHAPE = CallShape(
    open="<tool_call>{name}{line}",
    close="</tool_call>",
    between="{line}",
    arguments=TaggedArguments(
        grammar=_GRAMMAR,
        open="<arg_key>{key}</arg_key>{line}<arg_value>",
        close="</arg_value>{line}",
    ),
)


def detects(template_text: str) -> bool:
    return _ARGUMENT.open in template_text


def open_parser(tools: Tools, new_id: Callable[[], str]) -> ToolParser:
    return TaggedCallParser(_GRAMMAR, tools, new_id)
