"""Tool calls as Qwen3-Coder, Qwen3-Coder-Next and Qwen3.5 write them, with `<function=` tags.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Values are plain text; the tool's schema gives them their type.
"""

from __future__ import annotations

from collections.abc import Callable

from kttrio.text.call_grammar import Grammar, Tag, read_bracketed
from kttrio.text.call_lark import CallShape, TaggedArguments
from kttrio.text.tagged_calls import TaggedCallParser
from kttrio.text.tool_parsers.base import ToolParser, Tools

_GRAMMAR = Grammar(
    wrapper=Tag("<tool_call>", "</tool_call>"),
    call=Tag("<function=", "</function>"),
    argument=Tag("<parameter=", "</parameter>"),
    read_call=read_bracketed,
    read_argument=read_bracketed,
    padding="\n",
)


SHAPE = CallShape(
    open="<tool_call>\n<function={name}>\n",
    close="</function>\n</tool_call>",
    between="\n",
    arguments=TaggedArguments(
        grammar=_GRAMMAR, open="<parameter={key}>\n", close="\n</parameter>\n"
    ),
)


def detects(template_text: str) -> bool:
    return _GRAMMAR.call.open in template_text


def open_parser(tools: Tools, new_id: Callable[[], str]) -> ToolParser:
    return TaggedCallParser(_GRAMMAR, tools, new_id)
