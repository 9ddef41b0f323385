"""Command-line flags made from the fields of config records: one field, one flag, one help line.

Nothing here knows a particular setting, and no environment variable is read. Limits that concern
one number alone are checked here; what several settings must agree on, or what must exist on disk,
is checked by the subcommand.
"""

from __future__ import annotations

import argparse
import difflib
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from kttrio.config import ConfigError


def flag_name(field_name: str) -> str:
    """The flag of a field: `max_total_tokens` -> `--max-total-tokens`."""
    return "--" + field_name.replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: what was probably meant."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else "see --help"


def parse_flags(
    prog: str, description: str, argv: Sequence[str], records: Sequence[type[Any]]
) -> tuple[Any, ...]:
    """One filled instance of every record, from the arguments after the subcommand.

    `--flag value` and `--flag=value` mean the same; the last of several wins. The values of a list
    are separated by commas or spaces, but for those taken verbatim, of which a flag that comes
    again adds more. A field without help is not shown there, and a switch of
    that kind has no `--no-` form. Raises ConfigError naming the flag; `--help` prints and exits.
    """
    usage = f"{prog} [--flag VALUE] ..." if records else prog
    parser = _Parser(
        prog=prog,
        usage=usage,
        description=description,
        allow_abbrev=False,
        formatter_class=_WholeFlags,
    )
    for record in records:
        group = parser.add_argument_group(_first_line(record))
        hints = get_type_hints(record)
        for item in fields(record):
            _add_flag(group, item, hints[item.name])
    given, rest = parser.parse_known_args(list(argv))
    if rest:
        raise ConfigError(_unknown(rest[0], parser.known_flags()))
    return tuple(_fill(record, vars(given)) for record in records)


class _Parser(argparse.ArgumentParser):
    """argparse, with errors that are raised instead of printed."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument ").replace("one argument", "a value"))

    def known_flags(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]


class _WholeFlags(argparse.HelpFormatter):
    """argparse's help, in which no line ends within a flag: `--mem-fraction-static` is a word."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def _first_line(record: type[Any]) -> str:
    return (record.__doc__ or record.__name__).splitlines()[0].rstrip(".")


def _add_flag(group: argparse._ArgumentGroup, item: Field[Any], hint: Any) -> None:
    if item.metadata.get("positional"):
        group.add_argument(item.name, metavar=item.name.upper(), help=_help(item))
        return
    names = [flag_name(item.name)]
    if item.metadata.get("alias"):
        names.append(item.metadata["alias"])
    options: dict[str, Any] = {"dest": item.name, "default": None, "help": _help(item)}
    if hint is bool:
        pair = argparse.BooleanOptionalAction if item.metadata["help"] else "store_true"
        group.add_argument(*names, action=pair, **options)
        return
    shown = _plain_type(hint).__name__.upper()
    if item.metadata.get("choices"):
        shown = "{" + ",".join(item.metadata["choices"]) + "}"
    shown = "|".join((shown, *item.metadata.get("words", ())))
    if _is_list(hint):
        options["nargs"] = "*" if item.metadata.get("refused") else "+"
        options["action"] = "extend" if item.metadata.get("verbatim") else "store"
    group.add_argument(*names, metavar=shown, **options)


def _help(item: Field[Any]) -> str:
    text = item.metadata["help"]
    return text.replace("%", "%%") + _default_text(item.default) if text else argparse.SUPPRESS


def _default_text(default: Any) -> str:
    if default is None or default == ():
        return ""
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f" (default: {default})".replace("%", "%%")


def _unknown(argument: str, known: Sequence[str]) -> str:
    name = argument.partition("=")[0]
    if not name.startswith("-"):
        return f"unexpected argument {argument!r}; see --help for what is taken"
    return f"unknown flag {name}; {nearest(name, known)}"


def _fill(record: type[Any], given: dict[str, Any]) -> Any:
    hints = get_type_hints(record)
    values = {
        item.name: _convert(item, hints[item.name], given[item.name])
        for item in fields(record)
        if given[item.name] is not None
    }
    return record(**values)


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is tuple


def _plain_type(hint: Any) -> type[Any]:
    """The type of one given value: `int | None` -> int, `tuple[int, ...]` -> int; that of numbers
    where words may stand for one: `int | str` -> int."""
    if isinstance(hint, UnionType):
        hint = get_args(hint)[0]
    kind: type[Any] = get_args(hint)[0] if _is_list(hint) else hint
    return kind


def _convert(item: Field[Any], hint: Any, given: str | bool | list[str]) -> Any:
    if isinstance(given, bool):
        return given
    if item.metadata.get("refused"):
        raise ConfigError(f"{flag_name(item.name)}: {item.metadata['refused']}")
    kind = _plain_type(hint)
    try:
        if isinstance(given, list):
            words = given if item.metadata.get("verbatim") else _split(given)
            return tuple(_value(kind, word, item.metadata) for word in words)
        return _value(kind, given, item.metadata)
    except ConfigError as error:
        mend = item.metadata.get("mend")
        raise ConfigError(f"{flag_name(item.name)}: {error}{f'; {mend}' if mend else ''}") from None


def _split(given: list[str]) -> list[str]:
    return " ".join(given).replace(",", " ").split() or [""]


def _value(kind: type[Any], text: str, metadata: Any) -> Any:
    if not text:
        raise ConfigError("needs a value, got an empty one")
    choices = metadata.get("choices")
    if choices:
        text = _choose(text, choices, metadata.get("others", ()))
    if text.casefold() in metadata.get("words", ()):
        return text.casefold()
    if kind in (int, float):
        return _number(kind, text, metadata)
    return Path(text).expanduser() if kind is Path else text


def _choose(text: str, choices: Sequence[str], others: Sequence[str]) -> str:
    """The choice that is meant, in whatever case it is written."""
    for choice in (*choices, *others):
        if choice.casefold() == text.casefold():
            return choice
    known = f"none of {', '.join(choices)}" if len(choices) > 1 else f"not {choices[0]}"
    raise ConfigError(f"{text!r} is {known}")


def _number(kind: type[Any], text: str, metadata: Any) -> Any:
    try:
        value = kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        wanted = " or ".join((wanted, *metadata.get("words", ())))
        raise ConfigError(f"{text!r} is not {wanted}") from None
    least, most = metadata.get("least"), metadata.get("most")
    if not math.isfinite(value):
        raise ConfigError(f"{text} is not a finite number")
    if least is not None and value < least:
        raise ConfigError(f"{text} is too small; the least is {least}")
    if most is not None and value > most:
        raise ConfigError(f"{text} is too large; the most is {most}")
    return value
