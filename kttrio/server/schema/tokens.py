"""Kinds of values that hold token ids. Whether the model has them is looked at later."""

from __future__ import annotations

from typing import Any

from kttrio.server.schema.kinds import Integer, Number, check_type, refuse, whole

MAX_ID = 2**31 - 1
BIAS = Number(-100, 100)


class TokenIds:
    """An array of token ids, read as a tuple."""

    def read(self, value: Any, path: str) -> tuple[int, ...]:
        check_type(value, list, "an array of token ids", path)
        ids = [whole(item) for item in value]
        if any(token is None or not 0 <= token <= MAX_ID for token in ids):
            refuse(path, "must be an array of token ids")
        return tuple(token for token in ids if token is not None)

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": Integer(0, MAX_ID).schema()}


class Biases:
    """What is added to the logits of tokens, by their ids; read as pairs."""

    def read(self, value: Any, path: str) -> tuple[tuple[int, float], ...]:
        check_type(value, dict, "an object", path)
        return tuple((_bias_id(name, path), _bias(name, value, path)) for name in value)

    def schema(self) -> dict[str, Any]:
        names = {"pattern": "^[0-9]{1,9}$"}
        return {"type": "object", "propertyNames": names, "additionalProperties": BIAS.schema()}


def _bias_id(name: str, path: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 10):
        refuse(path, "has a key that is no token id")
    return int(name)


def _bias(name: str, biases: dict[str, Any], path: str) -> float:
    return BIAS.read(biases[name], f"{path}.{name}")
