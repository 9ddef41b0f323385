"""What an effort means to chat templates."""

from __future__ import annotations

from typing import Any

import pytest

from kttrio.server.asking.thinking import template_kwargs

OFF = {"reasoning_effort": "none", "enable_thinking": False, "thinking": False}
LOW = {"reasoning_effort": "low", "enable_thinking": True, "thinking": True}


@pytest.mark.parametrize(
    ("given", "effort", "told"),
    [
        (None, None, {}),
        (None, "none", OFF),
        ({"a": 1}, "low", {"a": 1, **LOW}),
        ({"thinking": False}, "low", {"thinking": False, "reasoning_effort": "low"}),
        ({"reasoning_effort": "high"}, "none", {**OFF, "reasoning_effort": "high"}),
    ],
)
def test_the_clients_own_values_go_first(
    given: dict[str, Any] | None, effort: str | None, told: dict[str, Any]
) -> None:
    assert template_kwargs(given, effort) == told
