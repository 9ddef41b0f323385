"""Counters in pinned memory, written and watched by a stream: kernels of one thread.

A captured stream cannot be told how often it has run, so the numbers are counted on the device.
They may pass their largest value; only differences are looked at.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _announce(count, ready):
    number = tl.load(count) + 1
    tl.store(count, number)
    tl.store(ready, number)


@triton.jit
def _wait(count, done):
    goal = tl.load(count)
    while tl.load(done, volatile=True) - goal < 0:
        pass


def announce(count: Tensor, ready: Tensor) -> None:
    """One more: what the stream did before can be read by whoever sees it in `ready`."""
    _announce[(1,)](count, ready, num_warps=1)


def wait(count: Tensor, done: Tensor) -> None:
    """The stream goes on once `done` has come to what was announced last."""
    _wait[(1,)](count, done, num_warps=1)
