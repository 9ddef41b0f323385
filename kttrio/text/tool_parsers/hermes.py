"""Tool calls as Hermes, Qwen2.5, Qwen3 and Qwen3-Next-Instruct write them, all of it JSON.

    <tool_call>
    {"name": NAME, "arguments": {...}}
    </tool_call>

The members come in any order, others are skipped, and `parameters` is understood for `arguments`.
An object that names no tool is content, with its tags.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Literal

from kttrio.text.call_lark import CallShape, JsonArguments
from kttrio.text.call_pieces import Pieces
from kttrio.text.json_arguments import Arguments
from kttrio.text.json_calls import CallState, JsonCalls, Tags
from kttrio.text.json_scan import JsonScanner
from kttrio.text.markers import Markers
from kttrio.text.tool_parsers.base import ToolParser, Tools

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_OTHER_FORMATS = ("<function=", "<arg_key>")
_TAGS = Tags(
    wrappers=(_CALL,),
    begin="{",
    closings=(_CALL_END,),
    ends=("}" + _CALL_END, "}\n" + _CALL_END, _CALL_END, _CALL),
    tails=("}",),
    begins_bare=False,
)
_ENDS = Markers((_CALL_END, _CALL))
_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\n\r"
_Part = Literal["key", "colon", "value", "arguments"]


SHAPE = CallShape(
    open=_CALL + '\n{"name": "{name}", "arguments": ',
    close="}\n" + _CALL_END,
    between="\n",
    arguments=JsonArguments(),
)


def detects(template_text: str) -> bool:
    return _CALL in template_text and not any(tag in template_text for tag in _OTHER_FORMATS)


def open_parser(tools: Tools, new_id: Callable[[], str]) -> ToolParser:
    return JsonCalls(_TAGS, lambda pieces: HermesCall(pieces, new_id))


class HermesCall:
    """One call's object, from behind its opening bracket. Its arguments stream once it is named;
    those that come before the name wait for it."""

    def __init__(self, pieces: Pieces, new_id: Callable[[], str]) -> None:
        self.state: CallState = "unknown"
        self._pieces = pieces
        self._new_id = new_id
        self._steps = {
            "key": self._read_key,
            "colon": self._read_colon,
            "value": self._read_value,
            "arguments": self._read_arguments,
        }
        self._part: _Part = "key"
        self._text = ""
        self._final = False
        self._scanner = JsonScanner()
        self._json: list[str] = []  # of the key or the value that is being read
        self._key = ""
        self._name = ""
        self._early = ""  # arguments that came before the name
        self._arguments = Arguments(pieces, _TAGS.ends)

    def read(self, text: str, *, final: bool) -> str:
        self._text, self._final = text, final
        while self.state in ("unknown", "begun") and self._steps[self._part]():
            pass
        return self._text

    def finish(self, *, cut_off: bool) -> None:
        if self._part == "value" and self._key in _ARGUMENTS and self.state == "unknown":
            self.state = "refused"  # they are no object, and not all there
        else:
            self._end(cut_off=cut_off)

    # Each step reads what is certain off the text, and says if it got on.

    def _read_key(self) -> bool:
        if not self._json:
            self._text = self._text.lstrip(_SPACE + ",")
            if self._text.startswith("}"):
                self._text = self._text[1:]
                self._end()
                return True
            if not self._text.startswith('"'):
                return bool(self._text) and self._meets_end()
        if not self._scan():
            return False
        self._key = json.loads("".join(self._json))
        self._part = "colon"
        return True

    def _read_colon(self) -> bool:
        self._text = self._text.lstrip(_SPACE)
        if not self._text.startswith(":"):
            return bool(self._text) and self._meets_end()
        self._text = self._text[1:]
        self._go_on("value")
        return True

    def _read_value(self) -> bool:
        if not self._json:
            self._text = self._text.lstrip(_SPACE)
            if self._text.startswith("{") and self._name and self._wants_arguments():
                self._begin()
                self._part = "arguments"
                return True
        if not self._scan():
            return False
        self._take_value()
        self._go_on("key")
        return True

    def _read_arguments(self) -> bool:
        self._text = self._arguments.read(self._text, final=self._final)
        if self._arguments.over:
            self._go_on("key")
        return self._arguments.over

    def _go_on(self, part: _Part) -> None:
        self._part = part
        self._scanner, self._json = JsonScanner(), []

    def _scan(self) -> bool:
        """Whether the JSON of a key or a value is complete."""
        part, self._text = self._scanner.read(self._text, final=self._final)
        if part:
            self._json.append(part)
        if self._scanner.stuck:
            self._meets_end()
        return self._scanner.done

    def _meets_end(self) -> bool:
        """Here the object is no JSON: it ends at a tag, or it is no call."""
        half_a_tag = _ENDS.held(self._text) == len(self._text)
        if half_a_tag and not self._final:
            return False
        if self.state == "begun" or half_a_tag or self._text.startswith((_CALL_END, _CALL)):
            self._end()
        else:
            self.state = "refused"
        return True

    def _wants_arguments(self) -> bool:
        return self.state == "unknown" and self._key in _ARGUMENTS

    def _take_value(self) -> None:
        value = "".join(self._json)
        if self._key == "name" and not self._name:
            self._take_name(value)
        elif self._wants_arguments():
            self._take_arguments(_as_object(value))

    def _take_name(self, text: str) -> None:
        self._name = json.loads(text).strip() if text.startswith('"') else ""
        if not self._name.isprintable() or not self._name:
            self.state = "refused"
        elif self._early:
            self._take_arguments(self._early)

    def _take_arguments(self, arguments: str | None) -> None:
        """Arguments that are all there; None: what is there is no object."""
        if arguments is None:
            self.state = "refused"
        elif self._name:
            self._begin()
            self._arguments.read(arguments, final=True)
        else:
            self._early = arguments

    def _begin(self) -> None:
        self._pieces.begin_call(self._name, self._new_id())
        self.state = "begun"

    def _end(self, *, cut_off: bool = False) -> None:
        if self.state == "unknown":
            if not self._name:
                self.state = "refused"
                return
            self._begin()
        self._arguments.end(cut_off=cut_off)
        self.state = "over"


def _as_object(text: str) -> str | None:
    """The JSON object that the text is, or is a string of; null is one without members."""
    try:
        value = json.loads(text)
        if isinstance(value, str):
            text, value = value.strip(), json.loads(value)
            text.encode()  # a string may hide half a surrogate pair, which nobody can send on
    except (ValueError, RecursionError):
        return None
    if value is None:
        return "{}"
    return text if isinstance(value, dict) else None
