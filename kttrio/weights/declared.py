"""What a config.json says of how weights are stored, for when there are no tensors to tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kttrio.weights.formats.base import PLAIN
from kttrio.weights.loader import Part

IsFp8 = Callable[[Part], bool]

# Fields that list modules, by the quantiser that wrote them.
_LISTS = ("modules_to_not_convert", "ignored_layers")
# Modules that published FP8 checkpoints keep as they were, whether they list them or not.
_NEVER = ("lm_head", "eh_proj", "visual", "weights_proj", "in_proj_ba", "in_proj_a", "in_proj_b")


def declared_format(raw: dict[str, Any]) -> str:
    """The format of the experts that a parsed config.json speaks of."""
    return "fp8" if raw.get("quantization_config") else PLAIN


def declared_fp8(raw: dict[str, Any]) -> IsFp8:
    """Which matrices a parsed config.json has in FP8: all but those of modules that it lists, by
    their names or parts of these, and of those that never are."""
    fields = raw.get("quantization_config")
    if not fields:
        return lambda _: False
    listed = [name for field in _LISTS for name in fields.get(field) or ()]
    plain = [f".{name}." for name in (*_NEVER, *listed)]

    return lambda part: not any(name in f".{part.name}" for name in plain)
