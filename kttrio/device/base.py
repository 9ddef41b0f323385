"""The seam to a device: everything of it that is not a tensor operation.

Streams keep an order, events join them, host work runs at its place in that order, and a step can
be captured once and replayed. `cuda.py` is the real thing; `host.py` is its twin for a CPU that
stands in for the device: the same calls, so the same order of events, without a GPU.

Work handed to a stream may run later than the call that hands it over. So it writes into tensors
that are there already, and nobody touches these before an event says that it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kttrio.native import Job

Work = Callable[[], object]
"""Tensor operations on tensors that outlive it; its result is dropped."""


class Event(Protocol):
    """A place in a stream's order."""

    @property
    def is_done(self) -> bool:
        """All that came before it has run."""
        ...

    def synchronize(self) -> None:
        """The calling thread waits for it. Raises what host work before it raised."""
        ...


class Stream(Protocol):
    """Work of one kind, done in the order in which it is handed over."""

    def run(self, work: Work) -> None:
        """Tensor operations and copies. Exceptions of the work come up here or where an event
        after it is waited for."""
        ...

    def start(self, job: Job) -> None:
        """Start a job of the expert library once all before it has run; what follows does not wait
        for its end."""
        ...

    def finish(self, job: Job) -> None:
        """What follows waits for the job's end. What went wrong in it is raised by `job.wait`."""
        ...

    def record(self) -> Event:
        """The place after all that was handed over so far."""
        ...

    def wait(self, event: Event) -> None:
        """What follows waits for another stream's event; the caller does not."""
        ...


class Graph(Protocol):
    """A captured piece of work."""

    def replay(self) -> None:
        """The same operations, host work included, on the same tensors: only what these hold may
        differ. Belongs to the main stream."""
        ...


class JobMaker(Protocol):
    """`ExpertLayer.job` with its tensors given: what is left are the flags of a device that says in
    memory when they are there."""

    def __call__(
        self,
        *,
        ready: Tensor | None = None,
        done: Tensor | None = None,
        by_waiter: bool = False,
    ) -> Job: ...


class Device(Protocol):
    """Where the dense layers and the hottest experts live."""

    @property
    def where(self) -> torch.device:
        """Where its tensors are made."""
        ...

    @property
    def main(self) -> Stream:
        """The stream on which plain tensor operations run."""
        ...

    @property
    def is_capturing(self) -> bool:
        """Within `capture`: nothing may wait for the device or look at a value."""
        ...

    def open_stream(self, name: str) -> Stream:
        """Another stream; the name is for people and tests."""
        ...

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Host memory, uninitialised, that copies to and from the device need not wait for."""
        ...

    def new_job(self, make: JobMaker) -> Job:
        """A job that streams of this device can start. It is closed after a `synchronize`, not
        while a stream may still start or finish it."""
        ...

    def capture(self, work: Work) -> Graph:
        """Capture `work`, which may use every stream of this device but must join them to the main
        one before it ends. It runs at least once here. Raises RuntimeError for work that waits for
        the device or makes the host look at a value: that would be baked in."""
        ...

    def check_jobs(self) -> None:
        """Wait for the jobs that were started so far, and raise what went wrong in one. Once a
        step's results have come that is no wait."""
        ...

    def synchronize(self) -> None:
        """Wait for all streams and jobs; raises what their work raised."""
        ...
