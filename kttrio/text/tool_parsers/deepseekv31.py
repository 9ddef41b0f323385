"""Tool calls as DeepSeek-V3.1 and V3.1-Terminus write them.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>
    <｜tool▁calls▁end｜>

(in one line). The code fence of DeepSeek-V3 around the JSON, which the model falls back into at
times, is understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from kttrio.text.call_lark import CallShape, JsonArguments
from kttrio.text.tool_parsers.base import ToolParser, Tools
from kttrio.text.tool_parsers.deepseekv3 import (
    CALL,
    CALL_END,
    FENCE,
    SECTION,
    SECTION_END,
    SEPARATOR,
    open_headed,
)

_HEAD = re.compile(rf"\s*([^\s`<>]+)\s*{SEPARATOR}\s*(?:{FENCE}[a-z]*\s*)?")


SHAPE = CallShape(
    begin=SECTION,
    open=CALL + "{name}" + SEPARATOR,
    close=CALL_END,
    end=SECTION_END,
    arguments=JsonArguments(),
)


def detects(template_text: str) -> bool:
    return SEPARATOR in template_text and FENCE + "json" not in template_text


def open_parser(tools: Tools, new_id: Callable[[], str]) -> ToolParser:
    return open_headed(_HEAD, new_id)
