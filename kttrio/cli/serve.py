"""`kttrio serve`: reads the settings, shows what was decided, and runs the server.

What the server does is in kttrio/serve.py; here are its flags, its face and its exit codes.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Self

import trio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kttrio.cli.flags import flag_name, parse_flags
from kttrio.config import ConfigError, EngineConfig, ExpertConfig, ModelConfig, ServerConfig
from kttrio.serve import Decisions, Ended, Settings, serve

DESCRIPTION = "Load a model and answer OpenAI clients over HTTP."


def run(argv: Sequence[str]) -> int:
    """0 after a clean end, 1 when the engine failed or a second signal cut it short."""
    records = [ModelConfig, ExpertConfig, EngineConfig, ServerConfig]
    settings = Settings(*parse_flags("kttrio serve", DESCRIPTION, argv, records))
    check_paths(settings)
    _set_up_logging(settings.server.log_level)
    try:
        with Face(Console(soft_wrap=True, highlight=False), settings) as face:
            trio.run(serve, settings, face)
    except Ended as error:
        print(f"kttrio serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def check_paths(settings: Settings) -> None:
    """Every given path exists and is of its kind; ConfigError names the first that does not."""
    directories = [(settings.model, "model"), (settings.experts, "kt_weight_path")]
    for record, name in directories:
        _check_path(record, name, Path.is_dir, "directory")
    _check_path(settings.server, "chat_template", Path.is_file, "file")


def _check_path(record: object, name: str, is_kind: Callable[[Path], bool], kind: str) -> None:
    path: Path | None = getattr(record, name)
    if path is not None and not is_kind(path):
        raise ConfigError(f"{flag_name(name)}: {path} is no {kind}; check the path")
