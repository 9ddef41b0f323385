"""Where the work that a request's text makes is done: long texts do not hold up the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

LONG_BODY = 1 << 16
"""Bytes of a request from which on its text is worked on in a thread."""

T = TypeVar("T")


async def off_loop(num_bytes: int, work: Callable[[], T]) -> T:
    """Do what a long body makes long in a thread, short work at once."""
    if num_bytes < LONG_BODY:
        return work()
    return await trio.to_thread.run_sync(work)
