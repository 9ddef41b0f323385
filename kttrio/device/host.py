"""A CPU that stands in for the device: the same calls, so the same order of events, without a GPU.

The main stream is the calling thread itself: what it is given is done when the call returns. So is
what other streams are given, until one of them has to wait for a job or another stream: the rest
then stays until somebody waits for it. Thus a job runs beside the main stream's work here, too.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from kttrio.device.base import Event, Work
from kttrio.native import Job

Item = Callable[[], object]


class HostStream:
    """Work in the order in which it is handed over. Used from one thread at a time."""

    def __init__(self, name: str, jobs: weakref.WeakSet[Job], *, is_main: bool) -> None:
        self.name = name
        self._jobs = jobs
        self._is_main = is_main
        self._left: deque[Item] = deque()
        self._num_given = 0
        self._failure: Exception | None = None

    def run(self, work: Work) -> None:
        self._give(work)

    def start(self, job: Job) -> None:
        self._give(partial(self._submit, job))

    def finish(self, job: Job) -> None:
        self._give(job.join, waits=True)

    def record(self) -> HostEvent:
        return HostEvent(self, self._num_given)

    def wait(self, event: Event) -> None:
        event = cast("HostEvent", event)
        self._give(event.synchronize, waits=event.stream.num_done < event.place)

    @property
    def num_done(self) -> int:
        return self._num_given - len(self._left)

    def reach(self, place: int) -> None:
        """Do what was handed over before this place; what fails is kept, and the rest done."""
        while self.num_done < place:
            item = self._left.popleft()
            try:
                item()
            except Exception as error:
                self._failure = self._failure or error

    def drain(self) -> None:
        """Do all that is left, as `reach` does."""
        self.reach(self._num_given)

    def raise_failure(self) -> None:
        """Raise, once, the first thing that failed."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _give(self, item: Item, *, waits: bool = False) -> None:
        stays = not self._is_main and (waits or bool(self._left))
        self._left.append(_kept(item) if stays else item)
        self._num_given += 1
        if not stays:
            self.drain()
            self.raise_failure()

    def _submit(self, job: Job) -> None:
        self._jobs.add(job)
        job.submit()


@dataclass(frozen=True, slots=True)
class HostEvent:
    """After so many items of a stream."""

    stream: HostStream
    place: int

    @property
    def is_done(self) -> bool:
        """Always: nobody else does what is left."""
        self.stream.reach(self.place)
        return True

    def synchronize(self) -> None:
        self.stream.reach(self.place)
        self.stream.raise_failure()


class HostDevice:
    """`Device` of `--device cpu`."""

    where = torch.device("cpu")

    def __init__(self) -> None:
        self._jobs: weakref.WeakSet[Job] = weakref.WeakSet()
        """Started since the last `synchronize`."""
        self.main = HostStream("main", self._jobs, is_main=True)
        self._streams = [self.main]

    def open_stream(self, name: str) -> HostStream:
        stream = HostStream(name, self._jobs, is_main=False)
        self._streams.append(stream)
        return stream

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def synchronize(self) -> None:
        for stream in self._streams:
            stream.drain()
        jobs = [job for job in self._jobs if job.is_open]
        self._jobs.clear()
        raise_first([*(stream.raise_failure for stream in self._streams), *(j.wait for j in jobs)])


def _kept(item: Item) -> Item:
    """The same, whoever does it: only in inference mode may tensors of that mode be written."""
    return torch.inference_mode(torch.is_inference_mode_enabled())(item)


def raise_first(items: list[Item]) -> None:
    """Do all, then raise the first that failed."""
    failures: list[Exception] = []
    for item in items:
        try:
            item()
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]
