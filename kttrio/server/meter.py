"""What the server measures of its requests, whatever their protocol. How it is shown is known to
operators/metrics.py; what the engine measures stands in engine/measures.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from kttrio.engine.measures import WAIT_BOUNDS, Histogram

TOKEN_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5)
FIRST_TOKEN_BOUNDS = (0.005, 0.01, 0.02, 0.04, 0.08, *WAIT_BOUNDS[2:])
LAG_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
LAG_INTERVAL = 0.1


@dataclass(slots=True)
class Meter:
    """Since the start; times in seconds."""

    first_tokens: Histogram = field(default_factory=partial(Histogram, FIRST_TOKEN_BOUNDS))
    """From a request's last byte to the first token of any of its answers."""
    requests: Histogram = field(default_factory=partial(Histogram, WAIT_BOUNDS))
    """And to its end, however it ended."""
    prompt_tokens: Histogram = field(default_factory=partial(Histogram, TOKEN_BOUNDS))
    output_tokens: Histogram = field(default_factory=partial(Histogram, TOKEN_BOUNDS))
    """Of all answers to a request."""
    ends: Counter[str] = field(default_factory=Counter)
    """Answers by the reason for their end."""
    visits: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    """Requests over HTTP and gRPC by method, route and status."""
    connections: int = 0
    """Open now, over both."""
    refused_connections: int = 0
    """For there were too many."""
    lag: Histogram = field(default_factory=partial(Histogram, LAG_BOUNDS))
    """How late the event loop runs a task whose time has come."""

    def note_request(
        self, *, seconds: float, prompt_tokens: int, output_tokens: int, ends: Sequence[str]
    ) -> None:
        """A request that the engine took has ended."""
        self.requests.add(seconds)
        self.prompt_tokens.add(prompt_tokens)
        self.output_tokens.add(output_tokens)
        self.ends.update(ends)


async def watch_lag(meter: Meter) -> None:
    """Measure the event loop for as long as it runs."""
    while True:
        due = trio.current_time() + LAG_INTERVAL
        await trio.sleep_until(due)
        meter.lag.add(max(trio.current_time() - due, 0.0))
