"""Tool calls as Qwen3-Coder, Qwen3-Coder-Next and Qwen3.5 write them, with `<function=` tags.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Values are plain text; the tool's schema gives them their type. Nothing in the format is escaped,
so a tag counts as one only where what follows it fits; else it is part of the value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Literal

from kttrio.text.markers import Markers, follows
from kttrio.text.tool_parsers.base import (
    Content,
    ParsedPiece,
    ToolCallArguments,
    ToolCallStart,
    ToolParser,
    Tools,
)
from kttrio.text.tool_schema import NULLABLE_STRING, STRING, Kinds, argument_kinds, to_json

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"

_CONTENT_TAGS = Markers((_CALL, _FUNCTION))
_BODY_TAGS = Markers((_CALL, _CALL_END, _FUNCTION, _FUNCTION_END, _PARAMETER, _PARAMETER_END))
_VALUE_TAGS = Markers((_CALL_END, _FUNCTION_END, _PARAMETER, _PARAMETER_END))
_AFTER_END = {
    # what must follow a closing tag inside a value for it to be one; the end of the text also
    _PARAMETER_END: (_PARAMETER, _FUNCTION_END, _CALL_END, _FUNCTION, _CALL),
    _FUNCTION_END: (_CALL_END, _FUNCTION, _CALL),
    _CALL_END: (_CALL,),
}
_JSON = json.JSONEncoder(ensure_ascii=False)
_MAX_NAME = 256
_NAME = re.compile(rf"[^<>\n]{{0,{_MAX_NAME}}}")


def detects(template_text: str) -> bool:
    return _FUNCTION in template_text


def open_parser(tools: Tools, new_id: Callable[[], str]) -> ToolParser:
    return Qwen3CoderParser(tools, new_id)


_State = Literal[
    "content",
    "body",  # inside a function, outside its parameters
    "value",
    "after",  # behind a function: its wrapper may close
]


class Qwen3CoderParser:
    """One stream. Each step reads what is certain off the buffer, and says if it got on."""

    def __init__(self, tools: Tools, new_id: Callable[[], str]) -> None:
        self._tools = tools
        self._new_id = new_id
        self._steps: dict[_State, Callable[[], bool]] = {
            "content": self._read_content,
            "body": self._read_body,
            "value": self._read_value,
            "after": self._read_after,
        }
        self._state: _State = "content"
        self._buffer = ""
        self._pieces: list[ParsedPiece] = []
        self._final = False
        self._said = False  # content since the start or the last call
        self._junk = False  # text in a function's body that belongs to no tag
        self._argued = False  # a part of the call's arguments is out
        self._index = -1
        self._kinds: dict[str, Kinds] = {}
        self._given: set[str] = set()
        self._value = _Value("", STRING, first=True)

    def push(self, text: str) -> list[ParsedPiece]:
        if not self._buffer and text and "<" not in text:
            # the common cases, without a look at the state machine
            if self._said and self._state == "content":
                return [Content(text)]
            if self._value.streams and self._state == "value" and text[-1] != "\n":
                return [ToolCallArguments(self._index, _escape(text))]
        self._buffer += text
        return self._run()

    def finish(self, *, cut_off: bool = False) -> list[ParsedPiece]:
        self._final = True
        pieces = self._run()
        if self._state == "value":
            self._argue(self._value.add(self._last_of_value()))
            if not cut_off:
                self._end_value()
        if self._state in ("value", "body"):
            if not cut_off:
                self._close_call()
            elif not self._argued:
                self._argue("{")
        return pieces + self._run_out()

    def _run(self) -> list[ParsedPiece]:
        while self._steps[self._state]():
            pass
        return self._run_out()

    def _run_out(self) -> list[ParsedPiece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    # Content: up to the next call

    def _read_content(self) -> bool:
        found = _CONTENT_TAGS.find(self._buffer)
        if not found:
            held = 0 if self._final else _CONTENT_TAGS.held(self._buffer)
            self._say(len(self._buffer) - held)
            return False
        place, tag = found
        start = place + len(tag)
        if tag == _CALL:
            is_call = follows(self._buffer[start:], (_FUNCTION,))
            if is_call is None:
                self._say(len(self._buffer) if self._final else place)
                return False
            if not is_call:
                self._say(start)
                return True
            start = self._buffer.index(_FUNCTION, start) + len(_FUNCTION)
        return self._read_function(place, start)

    def _read_function(self, place: int, start: int) -> bool:
        """The tag begins at `place`, the name at `start`."""
        header = _read_name(self._buffer, start)
        if header is None:
            self._say(len(self._buffer) if self._final else place)
            return False
        name, end = header
        if not name:
            self._say(start)
            return True
        if not self._buffer[:place].isspace() or self._said:
            self._say(place)
            end -= place
        self._buffer = self._buffer[end:]
        self._open_call(name)
        return True

    def _say(self, size: int) -> None:
        """White space alone waits: beside a call it is no content."""
        text = self._buffer[:size]
        if not text or (
            text.isspace() and not self._said and not (self._final and self._index < 0)
        ):
            return
        self._said = True
        self._buffer = self._buffer[size:]
        self._tell(text)

    def _tell(self, text: str) -> None:
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, Content):
            text = last.text + text
            self._pieces.pop()
        self._pieces.append(Content(text))

    def _open_call(self, name: str) -> None:
        self._index += 1
        self._pieces.append(ToolCallStart(self._index, self._new_id(), name))
        self._kinds = argument_kinds(self._tools, name)
        self._given = set()
        self._said = self._junk = self._argued = False
        self._state = "body"

    # Body: from parameter to parameter

    def _read_body(self) -> bool:
        if not self._junk:
            self._buffer = self._buffer.lstrip()
        found = _BODY_TAGS.find(self._buffer)
        if not found:
            self._throw_out(len(self._buffer) - _BODY_TAGS.held(self._buffer))
            return False
        place, tag = found
        self._throw_out(place)
        if tag == _PARAMETER:
            return self._read_parameter()
        self._junk = False
        if tag == _PARAMETER_END:
            self._buffer = self._buffer[len(tag) :]
            return True
        self._close_call()
        if tag == _FUNCTION_END:
            self._buffer = self._buffer[len(tag) :]
        self._state = "content" if tag in (_CALL, _FUNCTION) else "after"
        return True

    def _throw_out(self, size: int) -> None:
        """Text between tags has no meaning in a call: the reader gets it."""
        if size:
            self._tell(self._buffer[:size])
            self._buffer = self._buffer[size:]
            self._junk = True

    def _read_parameter(self) -> bool:
        header = _read_name(self._buffer, len(_PARAMETER))
        if header is None:
            return False
        key, end = header
        if not key:
            self._throw_out(len(_PARAMETER))
            return True
        self._buffer = self._buffer[end:]
        self._junk = False
        self._value = _Value(key, self._kinds.get(key, STRING), first=not self._given)
        self._given.add(key)
        self._state = "value"
        return True

    def _close_call(self) -> None:
        self._argue("}" if self._given else "{}")
        self._state = "after"

    def _argue(self, fragment: str) -> None:
        if not fragment:
            return
        self._argued = True
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, ToolCallArguments) and last.index == self._index:
            fragment = last.json_fragment + fragment
            self._pieces.pop()
        self._pieces.append(ToolCallArguments(self._index, fragment))

    # Value: up to the tag that really ends it

    def _read_value(self) -> bool:
        if self._value.fresh:
            if not self._buffer:
                return False
            self._buffer = self._buffer.removeprefix("\n")
            self._value.fresh = False
        scanned = 0
        while found := _VALUE_TAGS.find(self._buffer, scanned):
            place, tag = found
            ends = self._ends_value(place, tag)
            if ends or (ends is None and self._final):
                self._argue(self._value.add(self._buffer[:place].removesuffix("\n")))
                self._buffer = self._buffer[place + len(tag) * (tag == _PARAMETER_END) :]
                self._end_value()
                return True
            if ends is None:
                self._take_value(place)
                return False
            scanned = place + len(tag)
        if not self._final:
            self._take_value(len(self._buffer) - _VALUE_TAGS.held(self._buffer))
        return False

    def _ends_value(self, place: int, tag: str) -> bool | None:
        """Whether the tag is one, or text of the value; None: what follows it decides."""
        if tag != _PARAMETER:
            return follows(self._buffer[place + len(tag) :], _AFTER_END[tag])
        header = _read_name(self._buffer, place + len(tag))
        if header is None:
            return None
        key = header[0]
        if key in self._kinds:
            return key not in self._given
        begins_line = self._buffer[place - 1] == "\n" if place else self._value.empty
        return bool(key) and begins_line

    def _take_value(self, size: int) -> None:
        """The newline at the end stays: it may be the one before the closing tag."""
        text = self._buffer[:size].removesuffix("\n")
        self._argue(self._value.add(text))
        self._buffer = self._buffer[len(text) :]

    def _last_of_value(self) -> str:
        """The rest of a value that nothing closed, without a closing tag cut in the middle."""
        text, self._buffer = self._buffer, ""
        held = _VALUE_TAGS.held(text)
        line = text[: len(text) - held]
        if held and (line.endswith("\n") or (not line and self._value.empty)):
            text = line
        return text.removesuffix("\n")

    def _end_value(self) -> None:
        self._argue(self._value.end())
        self._state = "body"

    # Behind a function

    def _read_after(self) -> bool:
        closes = follows(self._buffer, (_CALL_END,))
        if closes is None:
            if self._final:
                self._buffer = ""
            return False
        if closes:
            self._buffer = self._buffer.lstrip()[len(_CALL_END) :]
        else:
            self._state = "content"
        return True


class _Value:
    """One argument on its way to JSON: streamed where it can only be a string, else read whole."""

    __slots__ = ("_kinds", "_name", "_parts", "empty", "fresh", "streams")

    def __init__(self, key: str, kinds: Kinds, *, first: bool) -> None:
        self._kinds = kinds
        self._name = f"{'{' if first else ', '}{_JSON.encode(key)}: "
        self._parts: list[str] = []
        self.streams = False
        """Its JSON string is open: text goes out as it comes."""
        self.fresh = True
        """The character after the opening tag has not come."""
        self.empty = True
        """No text of the value has come."""

    def add(self, text: str) -> str:
        """JSON that is certain with this text."""
        if not text:
            return ""
        self.empty = False
        if self.streams:
            return _escape(text)
        self._parts.append(text)
        return self._begin_stream()

    def end(self) -> str:
        """The rest of the JSON."""
        if self.streams:
            return '"'
        return self._name + to_json("".join(self._parts), self._kinds)

    def _begin_stream(self) -> str:
        if self._kinds not in (STRING, NULLABLE_STRING):
            return ""
        text = "".join(self._parts)
        if self._kinds == NULLABLE_STRING and "null".startswith(text):
            return ""
        self.streams = True
        return f'{self._name}"{_escape(text)}'


def _escape(text: str) -> str:
    return _JSON.encode(text)[1:-1]


def _read_name(text: str, start: int) -> tuple[str, int] | None:
    """(name, place behind its `>`); the name is empty for a malformed tag, None: not yet known."""
    match = _NAME.match(text, start)
    end = match.end() if match else start
    if end == len(text) and end - start < _MAX_NAME:
        return None
    if text[end : end + 1] == ">":
        return text[start:end].strip(), end + 1
    return "", end
