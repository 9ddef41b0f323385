"""Tool calls as DeepSeek-V3.2 writes them, in DSML: tags with fullwidth bars.

    <｜DSML｜function_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true|false">VALUE</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>

The attribute tells text from JSON; where it is missing, the tool's schema does. Sometimes the model
writes its arguments as one JSON object instead, and that object inside another one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from kttrio.text.call_grammar import Grammar, Header, Tag, read_bracketed
from kttrio.text.call_lark import CallShape, TaggedArguments
from kttrio.text.tagged_calls import TaggedCallParser
from kttrio.text.tool_parsers.base import ToolParser, Tools
from kttrio.text.tool_schema import JSON, STRING, Kinds, read_object

_MARK = "｜DSML｜"
_ATTRIBUTES = re.compile(r'"([^"]+)"(?:.*?\sstring="(true|false)")?.*')
_KINDS: Mapping[str | None, Kinds] = {"true": STRING, "false": JSON, None: ()}
_OUTER = re.compile(r'\{\s*"(arguments|input)"\s*:(.*)\}', re.DOTALL)


def _read_attributes(text: str, start: int) -> Header | None:
    header = read_bracketed(text, start)
    if header is None:
        return None
    match = _ATTRIBUTES.fullmatch(header.name)
    return Header(match[1], header.end, _KINDS[match[2]]) if match else Header("", start)


def _read_body(body: str, known: Mapping[str, Kinds]) -> str | None:
    """The arguments of a body that is a JSON object, as the model wrote them. They may stand one
    level deeper, as an object or as its text, under a key that the tool itself does not have."""
    arguments = read_object(body)
    if arguments is None:
        return None
    outer = _OUTER.fullmatch(body.strip())
    if outer is None or outer[1] in known or len(arguments) != 1:
        return body.strip()
    value = arguments[outer[1]]
    inner = value if isinstance(value, str) else outer[2]
    return (body if read_object(inner) is None else inner).strip()


_GRAMMAR = Grammar(
    wrapper=Tag(f"<{_MARK}function_calls>", f"</{_MARK}function_calls>"),
    call=Tag(f"<{_MARK}invoke name=", f"</{_MARK}invoke>"),
    argument=Tag(f"<{_MARK}parameter name=", f"</{_MARK}parameter>"),
    read_call=_read_attributes,
    read_argument=_read_attributes,
    separator="\n\n",
    read_object=_read_body,
)


SHAPE = CallShape(
    begin=f"<{_MARK}function_calls>\n",
    open=f'<{_MARK}invoke name="{{name}}">\n',
    close=f"</{_MARK}invoke>\n",
    end=f"</{_MARK}function_calls>",
    arguments=TaggedArguments(
        grammar=_GRAMMAR,
        open=f'<{_MARK}parameter name="{{key}}" string="{{string}}">',
        close=f"</{_MARK}parameter>\n",
    ),
)


def detects(template_text: str) -> bool:
    return _MARK in template_text


def open_parser(tools: Tools, new_id: Callable[[], str]) -> ToolParser:
    return TaggedCallParser(_GRAMMAR, tools, new_id)
