"""Grammars in llguidance's dialect of Lark: what a form asks for, as text.

Not here: compiling it, and tool calls (call_lark.py).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from kttrio.text.grammar_error import GrammarError
from kttrio.text.json_schema import bounded
from kttrio.text.markers import Markers

MAX_CHARS = 1 << 18
MAX_EBNF_RULES = 512
"""The library takes time that grows with their square, and shares the interpreter with streams."""
SPACE = r"[ ]{1,2}|\r?\n[ \t]{0,32}"
"""White space between the parts of JSON: a weak model cannot go on with it for ever. A line's
indentation is that of eight levels, four blanks each."""
_CODE_POINT = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(?s:.))")
_CLOCK = r"[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?(?:Z|[+\-][0-9]{2}:[0-9]{2})"
_DAY = r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
_FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "date": _DAY,
        "time": _CLOCK,
        "date-time": f"{_DAY}T{_CLOCK}",
        "uuid": r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
        "email": r"[A-Za-z0-9_.+\-]{1,64}@[A-Za-z0-9\-]{1,63}(?:\.[A-Za-z0-9\-]{1,63}){1,8}",
        "uri": r"[A-Za-z][A-Za-z0-9+.\-]*:[!#-;=?-\[\]_a-z~%]+",
    }
)
"""What is written as plain text; within JSON llguidance knows more."""


class Rules:
    """The rules of one grammar, as they are written."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        """`special_tokens`: by what they stand for in a text; a tag may be written either way."""
        self._ids = special_tokens
        self._special = Markers(special_tokens)
        self._names: dict[str, str] = {}

    def add(self, body: str) -> str:
        """The name of a rule with this body."""
        return self._names.setdefault(body, f"r{len(self._names)}")

    def add_terminal(self, body: str) -> str:
        """The name of a terminal with this body."""
        return self._names.setdefault(body, f"T{len(self._names)}")

    def spell(self, text: str) -> str:
        """An expression for the text."""
        parts = []
        while found := self._special.find(text):
            place, token = found
            parts += [literal(text[:place])] if place else []
            parts.append(f"({literal(token)} | <[{self._ids[token]}]>)")
            text = text[place + len(token) :]
        return " ".join([*parts, literal(text)] if text else parts)

    def spell_behind(self, terminal: str, text: str) -> str:
        """An expression for what the terminal takes and the text that ends it. They are one, for
        no terminal leaves a text to the next one that it could take itself."""
        whole = self.add_terminal(f"{terminal} {literal(text)}")
        found = self._special.find(text)
        if not found:
            return whole
        place, token = found
        head = self.add_terminal(f"{terminal} {literal(text[:place])}")
        rest = self.spell(text[place + len(token) :])
        return f"({whole} | {head} <[{self._ids[token]}]> {rest})"

    def __str__(self) -> str:
        return "".join(f"{name}: {body}\n" for body, name in self._names.items())


def literal(text: str) -> str:
    """An expression for exactly this text."""
    return json.dumps(text, ensure_ascii=False)


def escape(text: str) -> str:
    """The text as a part of a pattern between slashes."""
    return re.escape(text).replace("/", r"\/")


def searched(pattern: str) -> str:
    """A terminal's body: text that the pattern, of a JSON schema, is found in."""
    start = "" if pattern.startswith("^") else "(?s:.*)"
    end = "" if _has_end(pattern) else "(?s:.*)"
    return f"/{regex_to_lark(f'{start}(?:{_without_ends(pattern)}){end}', 'dw')}/"


def string_format(name: str) -> str:
    """A terminal's body: text in this format of JSON schemas."""
    if name not in _FORMATS:
        raise GrammarError(f"'format' {name!r} cannot be enforced for text")
    return f"/{_FORMATS[name]}/"


def json_value(schema: Mapping[str, Any]) -> str:
    """A rule's body: JSON that the schema allows, without properties that it does not list or
    integers beyond 64 bits."""
    options = {"whitespace_pattern": SPACE}
    try:
        return "%json " + json.dumps({**bounded(schema), "x-guidance": options})
    except RecursionError:
        raise GrammarError("nested too deeply") from None


def of_form(kind: str, source: str) -> str:
    """The grammar of a form, by its kind. Raises GrammarError."""
    if len(source) > MAX_CHARS:
        raise GrammarError(f"{len(source)} characters long; at most {MAX_CHARS} are taken")
    return _FORMS[kind](source)


def _of_json_object(source: str) -> str:
    return "start: " + json_value({"type": "object"})


def _of_json_schema(source: str) -> str:
    schema = _read_json(source)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError("a JSON schema must be an object")
    return "start: " + json_value(schema)


def _of_regex(pattern: str) -> str:
    """An answer that the pattern matches from its beginning to its end."""
    return f"start: /{regex_to_lark(_without_ends(pattern), '')}/"


def _of_choice(source: str) -> str:
    choices = _read_json(source)
    if not isinstance(choices, list) or not choices:
        raise GrammarError("the choices must be a list of one string or more")
    if not all(isinstance(choice, str) for choice in choices):
        raise GrammarError("each choice must be a string")
    return f"start: CHOICE\nCHOICE: {' | '.join(map(literal, choices))}"


def _of_ebnf(source: str) -> str:
    if (num_rules := source.count("::=")) > MAX_EBNF_RULES:
        raise GrammarError(f"{num_rules} rules long; at most {MAX_EBNF_RULES} are taken")
    try:
        return gbnf_to_lark(_CODE_POINT.sub(_character, source))
    except RecursionError:
        raise GrammarError("nested too deeply") from None
    except Exception as error:  # the library raises plain Exception for a bad grammar
        raise GrammarError(str(error)) from None


def _character(escape: re.Match[str]) -> str:
    """The library mistakes escapes like \\u00e9; a character that means nothing else may come as
    it is."""
    code = escape[1] or escape[2]
    character = chr(int(code, 16)) if code and int(code, 16) <= sys.maxunicode else ""
    return character if character.isalnum() else escape[0]


def _of_lark(source: str) -> str:
    return source


def _read_json(source: str) -> Any:
    try:
        return json.loads(source)
    except RecursionError:
        raise GrammarError("nested too deeply") from None
    except ValueError as error:
        raise GrammarError(f"not valid JSON: {error}") from None


def _without_ends(pattern: str) -> str:
    return pattern.removeprefix("^")[: -1 if _has_end(pattern) else None]


def _has_end(pattern: str) -> bool:
    """Whether it ends with `$`, not as a character."""
    before = pattern[:-1]
    return pattern.endswith("$") and (len(before) - len(before.rstrip("\\"))) % 2 == 0


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
