"""Work on the text of a request, kept from holding up the event loop: long texts go to threads,
few at a time. Encoding takes a hundred times a text's bytes, and each thread takes a processor from
the model, whose steps wait for the slowest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio
from trio.lowlevel import RunVar

LONG_BODY = 1 << 16
"""Bytes of a request from which on its text does not hold up the event loop."""
HUGE_BODY = 1 << 20
"""And from which on it waits for its like, not for shorter ones."""
MOST_LONG = 2
MOST_HUGE = 1

_LONG: RunVar[trio.CapacityLimiter] = RunVar("long bodies")
_HUGE: RunVar[trio.CapacityLimiter] = RunVar("huge bodies")

T = TypeVar("T")


async def off_loop(num_bytes: int, work: Callable[[], T]) -> T:
    """Do what a body of `num_bytes` makes long in a thread, short work at once."""
    if num_bytes < LONG_BODY:
        return work()
    limiter = _limiter(_HUGE, MOST_HUGE) if num_bytes >= HUGE_BODY else _limiter(_LONG, MOST_LONG)
    return await trio.to_thread.run_sync(work, limiter=limiter)


def _limiter(kept: RunVar[trio.CapacityLimiter], most: int) -> trio.CapacityLimiter:
    """The one of this event loop."""
    try:
        return kept.get()
    except LookupError:
        limiter = trio.CapacityLimiter(most)
        kept.set(limiter)
        return limiter
