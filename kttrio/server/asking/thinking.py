"""What chat templates are told of reasoning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
SWITCHES = ("enable_thinking", "thinking")
"""What templates call the switch: most the one, DeepSeek's and Kimi's the other."""


def template_kwargs(given: Mapping[str, Any] | None, effort: str | None) -> dict[str, Any]:
    """What chat templates are told: the client's own values, and what an effort means to them."""
    kwargs = dict(given or {})
    if effort is not None:
        kwargs.setdefault("reasoning_effort", effort)
        if not any(name in kwargs for name in SWITCHES):
            kwargs |= dict.fromkeys(SWITCHES, effort != "none")
    return kwargs
