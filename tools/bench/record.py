"""The file that --json names: looked at before minutes of measuring, written after them."""

from __future__ import annotations

import json
from pathlib import Path

from kttrio.config import ConfigError


def check_place(file: Path | None) -> None:
    """ConfigError where the file could not be written."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise ConfigError(f"--json {file}: name a file in a directory that is there")


def write_record(file: Path | None, record: object) -> None:
    if file is not None:
        file.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
