"""What a checkpoint says about generating: sampling defaults and the tokens that end a text.

Values a request leaves out come from here. Not here: checking a request's own values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kttrio.config import ConfigError
from kttrio.text.files import read_json_object


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """`generation_config.json` in the terms of SamplingParams; absent fields have no effect.

    `do_sample: false` makes `temperature` 0. Without `do_sample` the temperature counts.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def load(cls, directory: Path) -> GenerationDefaults:
        """Read the directory's file; all defaults when there is none. Raises ConfigError."""
        path = directory / "generation_config.json"
        return _read_defaults(path, read_json_object(path))


def load_eos_ids(directory: Path) -> tuple[int, ...]:
    """Every end token named by `generation_config.json` and `config.json`, in that order."""
    path = directory / "config.json"
    config = read_json_object(path)
    ids = list(GenerationDefaults.load(directory).eos_token_ids)
    ids += _token_ids(path, config)
    inner = config.get("text_config")
    if isinstance(inner, dict):
        ids += _token_ids(path, inner)
    return tuple(dict.fromkeys(ids))


def _read_defaults(path: Path, fields: dict[str, Any]) -> GenerationDefaults:
    def number(key: str, default: float, low: float, high: float) -> float:
        value = fields.get(key)
        if value is None:
            return float(default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _bad(path, key, value, "a number")
        if not low <= value <= high:
            raise _bad(path, key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    sampling = fields.get("do_sample")
    if sampling is not None and not isinstance(sampling, bool):
        raise _bad(path, "do_sample", sampling, "true or false")
    top_k = number("top_k", 0.0, -1, 1 << 30)
    if not top_k.is_integer():
        raise _bad(path, "top_k", top_k, "an integer")
    temperature = number("temperature", 1.0, 0.0, 100.0)
    return GenerationDefaults(
        temperature=0.0 if sampling is False else temperature,
        top_p=number("top_p", 1.0, 1e-9, 1.0),
        top_k=max(0, int(top_k)),
        min_p=number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=number("repetition_penalty", 1.0, 1e-9, 100.0),
        presence_penalty=number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=number("frequency_penalty", 0.0, -2.0, 2.0),
        eos_token_ids=tuple(dict.fromkeys(_token_ids(path, fields))),
    )


def _token_ids(path: Path, fields: dict[str, Any]) -> Iterator[int]:
    value = fields.get("eos_token_id")
    if value is None:
        return
    for token in value if isinstance(value, list) else [value]:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise _bad(path, "eos_token_id", value, "a token id or a list of them")
        yield token


def _bad(path: Path, key: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{path}: {key} is {value!r}, expected {expected}; correct or remove it")
