"""Streams without a GPU: what is handed over becomes values, done in an order that the GPU allows.

A twin of a device (`host.py`; tests have one that shuffles) says when each `Call` is done. Here is
what twins share: the protocol's methods, and graphs, which keep calls and torch operations and hand
them over again. A twin's capture is as strict as CUDA's: streams must come from the main one and
go back to it, and nothing may wait for the device.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from kttrio.device.base import Event, JobMaker, Work
from kttrio.device.jobs import STARTED_TWICE, check_jobs, raise_first
from kttrio.device.tape import Tape
from kttrio.native import Job


@dataclass(frozen=True, slots=True)
class Run:
    work: Work
    in_inference: bool
    """Only in inference mode may tensors of that mode be written, whoever does the work."""

    def __call__(self) -> None:
        with torch.inference_mode(self.in_inference):
            self.work()


@dataclass(frozen=True, slots=True)
class Start:
    job: Job

    def __call__(self) -> None:
        self.job.submit()


@dataclass(frozen=True, slots=True)
class Finish:
    job: Job

    def __call__(self) -> None:
        self.job.join()


@dataclass(frozen=True, slots=True)
class Wait:
    event: Event

    def __call__(self) -> None:
        self.event.synchronize()


Call: TypeAlias = Run | Start | Finish | Wait
"""What a stream is given; calling it does it."""


class TwinStream(ABC):
    """A `Stream`; used from one thread at a time."""

    def __init__(self, name: str, books: Books) -> None:
        self.name = name
        self._books = books

    def run(self, work: Work) -> None:
        self.take(Run(work, torch.is_inference_mode_enabled()))

    def start(self, job: Job) -> None:
        self._books.jobs.add(job)
        self.take(Start(job))

    def finish(self, job: Job) -> None:
        self.take(Finish(job))

    def wait(self, event: Event) -> None:
        if self._books.capture is None and isinstance(event, CapturedEvent):
            event.synchronize()  # tells why not
        self.take(Wait(event))

    def record(self) -> Event:
        capture = self._books.capture
        return self._mark() if capture is None else capture.record(self)

    def take(self, call: Call) -> None:
        capture = self._books.capture
        if capture is None:
            self._give(call)
        else:
            capture.take(self, call)

    @abstractmethod
    def drain(self) -> None:
        """Do all that was handed over; what fails is kept, and the rest done."""

    @abstractmethod
    def raise_failure(self) -> None:
        """Raise, once, the first thing that failed."""

    @abstractmethod
    def _give(self, call: Call) -> None:
        """Do it, or keep it until its time has come."""

    @abstractmethod
    def _mark(self) -> Event: ...


class Books:
    """What a twin and its streams know in common."""

    def __init__(self) -> None:
        self.jobs: weakref.WeakSet[Job] = weakref.WeakSet()
        """Started since the last `synchronize`."""
        self.capture: Capture | None = None


class TwinDevice(ABC):
    """A `Device` on the CPU."""

    where = torch.device("cpu")

    def __init__(self) -> None:
        self._books = Books()
        self._streams: list[TwinStream] = []
        self.main = self.open_stream("main")

    def open_stream(self, name: str) -> TwinStream:
        stream = self._new_stream(name, self._books)
        self._streams.append(stream)
        return stream

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    @property
    def is_capturing(self) -> bool:
        return self._books.capture is not None

    def new_job(self, make: JobMaker) -> Job:
        return make()

    def capture(self, work: Work) -> TwinGraph:
        """What it writes once here it has written as the first replay would."""
        self.synchronize()
        with self._capturing() as capture, torch.inference_mode():
            work()
            return capture.close()

    def check_jobs(self) -> None:
        check_jobs(self._books.jobs)

    def synchronize(self) -> None:
        if self.is_capturing:
            raise RuntimeError("a captured step may not wait for the device")
        for stream in self._streams:
            stream.drain()
        raise_first([*(stream.raise_failure for stream in self._streams), self.check_jobs])

    @abstractmethod
    def _new_stream(self, name: str, books: Books) -> TwinStream: ...

    @contextmanager
    def _capturing(self) -> Iterator[Capture]:
        with Tape() as tape:
            self._books.capture = Capture(self.main, tape)
            try:
                yield self._books.capture
            finally:
                self._books.capture = None


class CapturedEvent:
    """A place in a stream's order in each replay; no moment that could be waited for."""

    @property
    def is_done(self) -> bool:
        raise RuntimeError("an event of a captured step cannot be asked whether it is done")

    def synchronize(self) -> None:
        raise RuntimeError("only streams of the same captured step can wait for its events")


Given: TypeAlias = tuple[TwinStream, Call | CapturedEvent]


class TwinGraph:
    """A `Graph`: what streams were given."""

    def __init__(self, given: list[Given]) -> None:
        self._given = tuple(given)

    def replay(self) -> None:
        events: dict[Event, Event] = {}
        for stream, call in self._given:
            match call:
                case CapturedEvent():
                    events[call] = stream.record()
                case Wait():
                    stream.wait(events[call.event])
                case Start():
                    stream.start(call.job)
                case _:
                    stream.take(call)


class Capture:
    """What is handed over while a graph is captured, done at once and kept."""

    def __init__(self, main: TwinStream, tape: Tape) -> None:
        self._main, self._tape = main, tape
        self._given: list[Given] = []
        self._started: set[Job] = set()
        # How much of each stream's work comes before what each stream, or event, does next.
        self._before: dict[TwinStream, Counter[TwinStream]] = {main: Counter()}
        self._events: dict[CapturedEvent, Counter[TwinStream]] = {}

    def take(self, stream: TwinStream, call: Call) -> None:
        self._keep_main()
        if isinstance(call, Wait):
            self._join(stream, call.event)
        elif stream not in self._before:
            raise RuntimeError(
                f"the stream {stream.name!r} is given work of a captured step before it waits for "
                "an event of it"
            )
        else:
            call = self._done(call)
        self._before[stream][stream] += 1
        self._given.append((stream, call))

    def record(self, stream: TwinStream) -> CapturedEvent:
        self._keep_main()
        event = CapturedEvent()
        if stream in self._before:
            self._events[event] = self._before[stream].copy()
        self._given.append((stream, event))
        return event

    def close(self) -> TwinGraph:
        self._keep_main()
        for stream, before in self._before.items():
            if self._before[self._main][stream] < before[stream]:
                raise RuntimeError(
                    f"the main stream does not wait for the end of {stream.name!r} in this "
                    "captured step"
                )
        return TwinGraph(self._given)

    def _keep_main(self) -> None:
        """Plain operations so far are the main stream's."""
        operations = self._tape.cut()
        if len(operations):
            self._given.append((self._main, Run(operations, in_inference=True)))

    def _done(self, call: Call) -> Call:
        if isinstance(call, Start) and call.job in self._started:
            raise RuntimeError(STARTED_TWICE)
        call()
        if isinstance(call, Start):
            self._started.add(call.job)
        operations = self._tape.cut()
        return Run(operations, in_inference=True) if isinstance(call, Run) else call

    def _join(self, stream: TwinStream, event: Event) -> None:
        if not isinstance(event, CapturedEvent) or event not in self._events:
            raise RuntimeError(
                f"in a captured step the stream {stream.name!r} waits for an event that is not "
                "part of it"
            )
        self._before[stream] = self._before.get(stream, Counter()) | self._events[event]
