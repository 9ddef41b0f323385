"""Reads the small text and JSON files of a checkpoint; every error names the file and the mend.

Not here: tensors and their index, which belong to the back wing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kttrio.config import ConfigError


def read_text(path: Path) -> str:
    """The file as UTF-8, without a byte-order mark. Raises ConfigError."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; download it again") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The file's JSON object, or an empty one when there is no such file. Raises ConfigError."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value
