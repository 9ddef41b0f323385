"""The measuring itself works; what it finds is for a quiet machine to say."""

from __future__ import annotations

from tests.server.pace import measure


async def test_the_cost_per_token_is_measured() -> None:
    pace = await measure(4, step_seconds=0.005, seconds=0.2)
    assert pace.tokens >= 4 * (pace.steps - 1) > 0
    assert 0 < pace.cpu_us_per_token < 5000
