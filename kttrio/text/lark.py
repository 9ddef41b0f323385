"""Grammars in llguidance's dialect of Lark: what a form asks for, as text.

Not here: compiling it, and tool calls (call_lark.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from kttrio.text.grammar_error import GrammarError

MAX_CHARS = 1 << 18
MAX_DEPTH = 64
SPACE = r"[ ]{1,2}|\r?\n[ \t]{0,64}"
"""White space between the parts of JSON: a weak model can not go on with it for ever."""


def json_value(schema: Any) -> str:
    """A rule's body: JSON that the schema allows."""
    if isinstance(schema, bool) or not isinstance(schema, dict):
        schema = {"allOf": [schema]}
    options = {"whitespace_pattern": SPACE}
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=True)


def of_form(kind: str, source: str) -> str:
    """The grammar of a form, by its kind. Raises GrammarError."""
    if len(source) > MAX_CHARS:
        raise GrammarError(f"{len(source)} characters long; at most {MAX_CHARS} are taken")
    return _FORMS[kind](source)


def _of_json_object(source: str) -> str:
    return "start: " + json_value({"type": "object"})


def _of_json_schema(source: str) -> str:
    return "start: " + json_value(json.loads(source))


def _of_regex(pattern: str) -> str:
    """An answer that the pattern matches from its beginning to its end."""
    pattern = pattern.removeprefix("^")
    if re.search(r"(?<!\\)(\\\\)*\$$", pattern):
        pattern = pattern[:-1]
    return f"start: /{regex_to_lark(pattern, '')}/"


def _of_choice(source: str) -> str:
    return _of_regex("|".join(map(re.escape, json.loads(source))))


def _of_ebnf(source: str) -> str:
    return gbnf_to_lark(source)


def _of_lark(source: str) -> str:
    return source


_FORMS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "json_object": _of_json_object,
        "json_schema": _of_json_schema,
        "regex": _of_regex,
        "choice": _of_choice,
        "ebnf": _of_ebnf,
        "lark": _of_lark,
    }
)
