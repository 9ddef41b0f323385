"""How many inference requests came and how long they took, as Triton's statistics tell it.

Counted are the requests of its protocol alone, over HTTP and gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Spent:
    """A number of requests and what they took together."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def fields(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass(slots=True)
class InferenceCounts:
    """The sums since the start of the server."""

    success: Spent = field(default_factory=Spent)
    fail: Spent = field(default_factory=Spent)
    compute_input: Spent = field(default_factory=Spent)
    compute_infer: Spent = field(default_factory=Spent)
    compute_output: Spent = field(default_factory=Spent)
    last_inference: int = 0
    """When the last one began, in milliseconds since 1970; 0: none did."""

    def begin(self) -> Timing:
        """Start the clock of a request."""
        self.last_inference = time.time_ns() // 1_000_000
        return Timing(self)

    def fields(self) -> dict[str, Any]:
        """One model's statistics but for its name. What a request waits in the engine's line is
        part of `compute_infer`: batches there change from token to token, and so do waits."""
        nothing = Spent().fields()
        return {
            "last_inference": self.last_inference,
            "inference_count": self.success.count,
            "execution_count": self.success.count,
            "inference_stats": {
                "success": self.success.fields(),
                "fail": self.fail.fields(),
                "queue": nothing,
                "compute_input": self.compute_input.fields(),
                "compute_infer": self.compute_infer.fields(),
                "compute_output": self.compute_output.fields(),
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "response_stats": {},
            "batch_stats": [],
            "memory_usage": [],
        }


class Timing:
    """The clock of one request, which counts once, at its end."""

    def __init__(self, counts: InferenceCounts) -> None:
        self._counts = counts
        self._begun = self._prepared = self._answered = time.perf_counter_ns()
        self.failed = False
        """Set where a stream ends with an error, which no exception tells."""

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """The request is checked and encoded in this block; it fails if that raises."""
        try:
            yield
        except BaseException:
            self._fail()
            raise
        self._prepared = self._answered = time.perf_counter_ns()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """The model runs, and its answer is written in this block, which ends the request."""
        try:
            yield
        except BaseException:
            self._fail()
            raise
        if self.failed:
            self._fail()
        else:
            self._succeed()

    def mark_answered(self) -> None:
        """The model has said all; what remains is to write it down."""
        self._answered = time.perf_counter_ns()

    def _fail(self) -> None:
        self._counts.fail.add(time.perf_counter_ns() - self._begun)

    def _succeed(self) -> None:
        now, counts = time.perf_counter_ns(), self._counts
        counts.success.add(now - self._begun)
        counts.compute_input.add(self._prepared - self._begun)
        counts.compute_infer.add(self._answered - self._prepared)
        counts.compute_output.add(now - self._answered)
