"""Work on the text of a request, kept from holding up the event loop: long texts go to threads,
few at a time. Encoding takes a hundred times a text's bytes, and each thread takes a processor from
the model, whose steps wait for the slowest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio
from trio.lowlevel import RunVar

from kttrio.server.errors import ApiError

LONG_BODY = 1 << 16
"""Bytes of a request from which on its text does not hold up the event loop."""
HUGE_BODY = 1 << 20
"""And from which on it waits for its like, not for shorter ones."""
MOST_LONG = 2
MOST_HUGE = 1
MOST_WAITING = 16
"""Huge bodies that may wait: each takes its memory meanwhile, and seconds of a processor then."""
RETRY_SECONDS = 5.0

_LONG: RunVar[trio.CapacityLimiter] = RunVar("long bodies")
_HUGE: RunVar[trio.CapacityLimiter] = RunVar("huge bodies")

T = TypeVar("T")


async def off_loop(num_bytes: int, work: Callable[[], T], *, patient: bool = False) -> T:
    """Do what a text of `num_bytes` makes long in a thread, short work at once. Raises ApiError
    where too many of its like wait, unless it is `patient`: half done, it would be lost."""
    if num_bytes < LONG_BODY:
        return work()
    is_huge = num_bytes >= HUGE_BODY
    limiter = _limiter(_HUGE, MOST_HUGE) if is_huge else _limiter(_LONG, MOST_LONG)
    if is_huge and not patient and limiter.statistics().tasks_waiting >= MOST_WAITING:
        message = f"{MOST_WAITING} requests as long as this one wait already; try again later."
        raise ApiError(429, message, code="queue_full", retry_after=RETRY_SECONDS)
    return await trio.to_thread.run_sync(work, limiter=limiter)


def _limiter(kept: RunVar[trio.CapacityLimiter], most: int) -> trio.CapacityLimiter:
    """The one of this event loop."""
    try:
        return kept.get()
    except LookupError:
        limiter = trio.CapacityLimiter(most)
        kept.set(limiter)
        return limiter
