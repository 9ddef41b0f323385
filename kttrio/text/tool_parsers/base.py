"""What a tool-call parser is, and how one is found: its file name is its public name.

Each module beside this one offers `detects(template_text) -> bool`,
`open_parser(tools, new_id) -> ToolParser`, and `SHAPE`, how a model is made to write calls. Not
here: any format.
"""

from __future__ import annotations

import importlib
import pkgutil
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast

from kttrio.config import ConfigError
from kttrio.text.call_lark import CallShape

Tools = Sequence[Mapping[str, Any]]
"""Tools as OpenAI clients send them, with or without the `function` level."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "deepseek_v3": "deepseekv3",
        "deepseek_v31": "deepseekv31",
        "deepseek_v32": "deepseekv32",
        "glm": "glm45",
        "glm47": "glm45",
        "minimax-m2": "minimax_m2",
        "qwen": "hermes",
        "qwen25": "hermes",
        "qwen3_xml": "qwen3_coder",
    }
)
"""Other names that users know a parser by."""


class Content(NamedTuple):
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; `index` counts the calls of one answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The next part of a call's arguments, which together are a JSON object; in a format that has
    the model write JSON, its own text, mistakes included."""

    index: int
    json_fragment: str


ParsedPiece = Content | ToolCallStart | ToolCallArguments


class ToolParser(Protocol):
    """Reads one stream. Never raises: what is no call is content.

    All pieces together do not depend on how the text was cut.
    """

    def push(self, text: str) -> list[ParsedPiece]: ...

    def finish(self, *, cut_off: bool = False) -> list[ParsedPiece]:
        """What was held back. An open call is closed, so that its arguments are valid JSON; with
        `cut_off` (the length limit was met) they stay as incomplete as they are, so that nobody
        runs half a call by mistake."""
        ...


class _ParserModule(Protocol):
    SHAPE: CallShape

    def detects(self, template_text: str) -> bool: ...

    def open_parser(self, tools: Tools, new_id: Callable[[], str]) -> ToolParser: ...


def names() -> tuple[str, ...]:
    """Every name that a parser goes by."""
    return tuple(sorted((*_file_names(), *ALIASES)))


def check_name(name: str) -> str:
    """Our name for the parser. Raises ConfigError that lists all."""
    if name not in names():
        raise ConfigError(f"--tool-call-parser {name}: unknown; known are {', '.join(names())}")
    return ALIASES.get(name, name)


def detect(template_text: str) -> str | None:
    """The parser for the format that a checkpoint's chat template teaches."""
    return next((name for name in _file_names() if _module(name).detects(template_text)), None)


def new_call_id() -> str:
    return "call_" + secrets.token_hex(12)


def open_parser(name: str, tools: Tools, *, new_id: Callable[[], str] = new_call_id) -> ToolParser:
    """A parser for one answer to a request with these tools. Raises ConfigError."""
    return _module(check_name(name)).open_parser(tools, new_id)


def shape(name: str) -> CallShape:
    """How a model writes the calls that this parser reads. Raises ConfigError."""
    return _module(check_name(name)).SHAPE


def _file_names() -> tuple[str, ...]:
    modules = pkgutil.iter_modules([str(Path(__file__).parent)])
    return tuple(sorted(module.name for module in modules if module.name != "base"))


def _module(name: str) -> _ParserModule:
    return cast("_ParserModule", importlib.import_module(f"{__package__}.{name}"))
