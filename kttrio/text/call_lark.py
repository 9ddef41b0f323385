"""Grammars of tool calls in the format that a model was trained to write them in.

Each parser module states its format as a `CallShape`. Not here: what an argument may be where it
is plain text (tool_values.py), and how rules are written (lark.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kttrio.text import lark
from kttrio.text.call_grammar import Grammar
from kttrio.text.grammar_error import GrammarError
from kttrio.text.lark import Rules
from kttrio.text.tool_schema import descriptions
from kttrio.text.tool_values import Value, read_value

Parameters = Mapping[str, Any]

_NAME = re.compile(r"[^\s<>\"'`{}]{1,256}")
_KEY = re.compile(r"[^\s<>\"'](?:[^<>\n\"']{0,254}[^\s<>\"'])?")
_LEAD = r'("\n" | "\n\n")?'
"""Models write it before a call, as if text had come."""
_PLACES = re.compile(r"(\{(?:name|number|line)\})")
_KNOWN = frozenset(
    (
        *("type", "properties", "required", "additionalProperties", "$defs", "definitions"),
        *("title", "description", "default", "examples", "$schema", "$id", "$comment", "strict"),
    )
)
"""What may stand beside a tool's parameters where their values are plain text."""


class Arguments(Protocol):
    """How a format writes a call's arguments."""

    def write(self, parameters: Parameters, rules: Rules) -> str:
        """An expression for all of them. Raises GrammarError that names what cannot be enforced."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CallShape:
    """How a format writes calls. In the texts {name} stands for the function's name, {number} for
    any, {line} for a newline that may be missing."""

    begin: str = ""
    open: str
    close: str
    between: str = ""
    end: str = ""
    arguments: Arguments

    def write(
        self,
        tools: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        rules: Rules,
        *,
        several: bool,
    ) -> str:
        """An expression for one call of one of these tools, or for several. Raises GrammarError
        that names tool and keyword."""
        call = rules.add(" | ".join(self._calls(tools, names, rules)))
        more = f"({_spell(self.between, rules)} {call})*" if several else ""
        return f"{_LEAD} {_spell(self.begin, rules)} {call} {more} {_spell(self.end, rules)}"

    def _calls(
        self, tools: Sequence[Mapping[str, Any]], names: Sequence[str], rules: Rules
    ) -> Iterator[str]:
        known = {str(one.get("name")): one.get("parameters") for one in descriptions(tools)}
        for name in names:
            try:
                arguments = self.arguments.write(_parameters(known[name]), rules)
            except GrammarError as error:
                raise GrammarError(f"the tool {name!r}: {error}") from None
            if not _NAME.fullmatch(name):
                raise GrammarError(f"the tool {name!r}: its name cannot be written in a call")
            yield f"{_spell(self.open, rules, name)} {arguments} {_spell(self.close, rules, name)}"


class JsonArguments:
    """One JSON object."""

    def write(self, parameters: Parameters, rules: Rules) -> str:
        return lark.json_value(parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedArguments:
    """Each between tags of its own, in the order of the schema's properties."""

    grammar: Grammar
    """How they are read."""
    open: str
    """{key} stands for the argument's name, {string} for whether it is one."""
    close: str

    def write(self, parameters: Parameters, rules: Rules) -> str:
        extra = set(parameters) - _KNOWN
        if extra:
            raise GrammarError(f"'{min(extra)}' beside its parameters cannot be enforced")
        required = parameters.get("required", [])
        schemas = dict(parameters.get("properties", {}))
        schemas |= {key: {} for key in required if key not in schemas}
        written = (
            (key, self._argument(key, schema, parameters, rules)) for key, schema in schemas.items()
        )
        return " ".join(rule if key in required else f"{rule}?" for key, rule in written)

    def _argument(self, key: str, schema: object, root: Parameters, rules: Rules) -> str:
        """The rule of one argument."""
        if not _KEY.fullmatch(key):
            raise GrammarError(f"the name of its parameter {key!r} cannot be written in a call")
        try:
            value = read_value(schema, root, told="{string}" in self.open)
        except GrammarError as error:
            raise GrammarError(f"of its parameter {key!r}, {error}") from None
        found = [*self._strings(key, value, rules), *self._others(key, value, rules)]
        if not found:
            raise GrammarError(f"no value of its parameter {key!r} can be written")
        return rules.add(" | ".join(found))

    def _strings(self, key: str, value: Value, rules: Rules) -> Iterator[str]:
        opening = self._opening(key, "true", rules)
        close, line, _ = self.close.partition("{line}")
        for text in value.texts:
            ended = rules.spell_behind(self._text(text, rules), close)
            yield f"{opening} {ended} {_spell(line, rules)}"
        if value.words:
            words = " | ".join(map(lark.literal, value.words))
            yield f"{opening} ({words}) {_spell(self.close, rules)}"

    def _others(self, key: str, value: Value, rules: Rules) -> Iterator[str]:
        if value.others:
            opening = self._opening(key, "false", rules)
            yield f"{opening} ({' | '.join(value.others)}) {_spell(self.close, rules)}"

    def _opening(self, key: str, string: str, rules: Rules) -> str:
        return _spell(self.open.replace("{key}", key).replace("{string}", string), rules)

    def _text(self, limits: str, rules: Rules) -> str:
        """The terminal of a value that nothing in it ends."""
        free = rules.add_terminal(f"/(?s:.*)/ & ~/(?s:.*)(?:{self._end_pattern})(?s:.*)/")
        return rules.add_terminal(f"{free} & {limits}") if limits else free

    @property
    def _end_pattern(self) -> str:
        """What the parser takes, or may take, for the end of a value."""
        argument = map(lark.escape, self.grammar.argument)
        closes = (
            f"{lark.escape(tag)}\\s*(?:{'|'.join(map(lark.escape, behind))})"
            for tag, behind in self.grammar.after_close.items()
            if tag != self.grammar.argument.close
        )
        return "|".join((*argument, *closes))


def _parameters(given: object) -> Parameters:
    """A tool's parameters, which are those that it names, if it names any."""
    if given is None:
        given = {"properties": {}}
    if not isinstance(given, Mapping):
        raise GrammarError("its parameters are no schema")
    closed = {"additionalProperties": False} if "properties" in given else {}
    return {"type": "object", **closed, **given}


def _spell(text: str, rules: Rules, name: str = "") -> str:
    """An expression for a text with places."""
    places = {
        "{name}": rules.spell(name),
        "{number}": "/[0-9]{1,4}/",
        "{line}": lark.literal("\n") + "?",
    }
    return " ".join(places.get(part) or rules.spell(part) for part in _PLACES.split(text) if part)
