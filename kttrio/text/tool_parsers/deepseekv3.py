"""Tool calls as DeepSeek-V3, V3-0324 and R1-0528 write them, their JSON in a code fence.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
    ```json
    {...}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

Known by the fence: without one it is the format of DeepSeek-V3.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from kttrio.text.call_lark import CallShape, JsonArguments
from kttrio.text.json_calls import Head, HeadedCall, JsonCalls, Tags
from kttrio.text.tool_parsers.base import ToolParser, Tools

SEPARATOR = "<｜tool▁sep｜>"
FENCE = "```"
SECTION, SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
TAGS = Tags(
    wrappers=(SECTION,),
    begin=CALL,
    closings=(CALL_END, SECTION_END),
    ends=(
        "\n" + FENCE + CALL_END,
        FENCE + CALL_END,
        CALL_END,
        SECTION_END,
        CALL,
        SECTION,
    ),
    tails=(FENCE,),
)
_HEAD = re.compile(rf"\s*\w*\s*{SEPARATOR}\s*([^\s`<>]+)\s*(?:\n|(?=`))\s*(?:{FENCE}[a-z]*\s*)?")


SHAPE = CallShape(
    begin=SECTION,
    open=f"{CALL}function{SEPARATOR}{{name}}\n{FENCE}json\n",
    close=f"\n{FENCE}{CALL_END}",
    between="{line}",
    end=SECTION_END,
    arguments=JsonArguments(),
)


def detects(template_text: str) -> bool:
    return SEPARATOR in template_text and FENCE + "json" in template_text


def open_parser(tools: Tools, new_id: Callable[[], str]) -> ToolParser:
    return open_headed(_HEAD, new_id)


def open_headed(head: re.Pattern[str], new_id: Callable[[], str]) -> ToolParser:
    """A parser of calls that begin with `head`, whose group is the name."""

    def read_head(text: str) -> Head | None:
        found = head.fullmatch(text)
        return Head(found[1], new_id()) if found else None

    return JsonCalls(TAGS, lambda pieces: HeadedCall(pieces, TAGS.ends, read_head))
