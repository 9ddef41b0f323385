"""Tool calls as MiniMax-M2 and its successors up to M2.7 write them.

    <minimax:tool_call>
    <invoke name="NAME">
    <parameter name="KEY">VALUE</parameter>
    </invoke>
    </minimax:tool_call>

Several `invoke` share one block. Values are plain text, or JSON where the tool's schema asks for
another type. The inner tags are no special tokens of the model and also occur in prose about other
models' formats, so a call needs its block.
"""

from __future__ import annotations

from collections.abc import Callable

from kttrio.text.call_grammar import Grammar, Header, Tag, read_bracketed
from kttrio.text.call_lark import CallShape, TaggedArguments
from kttrio.text.tagged_calls import TaggedCallParser
from kttrio.text.tool_parsers.base import ToolParser, Tools


def _read_quoted(text: str, start: int) -> Header | None:
    header = read_bracketed(text, start)
    return header and header._replace(name=header.name.strip("\"'"))


_GRAMMAR = Grammar(
    wrapper=Tag("<minimax:tool_call>", "</minimax:tool_call>"),
    call=Tag("<invoke name=", "</invoke>"),
    argument=Tag("<parameter name=", "</parameter>"),
    read_call=_read_quoted,
    read_argument=_read_quoted,
    bare_calls=False,
    separator="\n",
)


SHAPE = CallShape(
    begin="<minimax:tool_call>\n",
    open='<invoke name="{name}">\n',
    close="</invoke>\n",
    end="</minimax:tool_call>",
    arguments=TaggedArguments(
        grammar=_GRAMMAR, open='<parameter name="{key}">', close="</parameter>\n"
    ),
)


def detects(template_text: str) -> bool:
    return "minimax:tool_call" in template_text


def open_parser(tools: Tools, new_id: Callable[[], str]) -> ToolParser:
    return TaggedCallParser(_GRAMMAR, tools, new_id)
