"""A device whose other streams do their work as early or late as its events allow.

The order is drawn from a seed, so what a test finds once it finds again. Only the main stream's
work runs with its caller. A job runs somewhere between its start and the moment for which somebody
waits; memory that nobody has written yet holds what makes a result wrong.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kttrio.device.twin import Books, Call, Finish, Start, TwinDevice, TwinStream, Wait
from kttrio.native import Job


@dataclass
class Field:
    """All streams of a device, and the dice."""

    dice: random.Random
    streams: list[ShuffledStream] = field(default_factory=list)
    jobs: deque[Job] = field(default_factory=deque)
    """Started and not run: a pool runs them one after the other."""

    def __post_init__(self) -> None:
        self._haste = self.dice.choice((0.1, 0.5, 0.9))
        self.is_advancing = False
        """One thing is being done: another must not come into the middle of it."""

    def stir(self) -> None:
        """Do some of what may be done, or nothing."""
        while self.dice.random() < self._haste and self.advance():
            pass

    def advance(self) -> bool:
        """Do one thing, drawn among all that may come next; False: there is none."""
        ready = [stream.advance for stream in self.streams if stream.is_ready]
        if self.jobs:
            ready.append(self._run_job)
        if ready:
            self.is_advancing = True
            try:
                self.dice.choice(ready)()
            finally:
                self.is_advancing = False
        return bool(ready)

    def _run_job(self) -> None:
        job = self.jobs.popleft()
        job.submit()
        job.join()


class ShuffledStream(TwinStream):
    def __init__(self, name: str, books: Books, field: Field) -> None:
        super().__init__(name, books)
        self._field = field
        self._is_main = not field.streams
        self._left: deque[Call] = deque()
        self._num_given = 0
        self._failure: Exception | None = None
        field.streams.append(self)

    @property
    def num_done(self) -> int:
        return self._num_given - len(self._left)

    @property
    def is_ready(self) -> bool:
        return bool(self._left) and self._may_pass(self._left[0])

    def advance(self) -> None:
        call = self._left.popleft()
        try:
            self._do(call)
        except Exception as error:
            self._failure = self._failure or error

    def reach(self, place: int) -> None:
        while self.num_done < place:
            if not self._field.advance():
                raise AssertionError(f"{self.name!r} waits for what never comes")

    def drain(self) -> None:
        self.reach(self._num_given)

    def raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _may_pass(self, call: Call) -> bool:
        if isinstance(call, Wait):
            return call.event.has_passed
        return not (isinstance(call, Finish) and call.job in self._field.jobs)

    def _do(self, call: Call) -> None:
        if isinstance(call, Start):
            assert call.job not in self._field.jobs, "started again while it is pending"
            self._field.jobs.append(call.job)
        elif isinstance(call, Wait):
            call.event.stream.raise_failure()
        elif not isinstance(call, Finish):
            call()

    def _give(self, call: Call) -> None:
        self._field.stir()
        self._left.append(call)
        self._num_given += 1
        if self._is_main:
            self.drain()
            self.raise_failure()
        else:
            self._field.stir()

    def _mark(self) -> ShuffledEvent:
        return ShuffledEvent(self, self._num_given)


@dataclass(frozen=True)
class ShuffledEvent:
    stream: ShuffledStream
    place: int

    @property
    def has_passed(self) -> bool:
        return self.stream.num_done >= self.place

    @property
    def is_done(self) -> bool:
        """Those who ask again and again see the others advance."""
        self.stream._field.advance()
        return self.has_passed

    def synchronize(self) -> None:
        self.stream.reach(self.place)
        self.stream.raise_failure()


class ShuffledDevice(TwinDevice):
    def __init__(self, seed: int) -> None:
        self.field = Field(random.Random(seed))
        super().__init__()

    def _new_stream(self, name: str, books: Books) -> ShuffledStream:
        return ShuffledStream(name, books, self.field)

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Values that show wherever they are used before they are written."""
        made = super().pinned(*shape, dtype=dtype)
        if dtype.is_floating_point:
            return made.fill_(float("nan"))
        return made.fill_(True if dtype is torch.bool else torch.iinfo(dtype).max)

    @contextmanager
    def stirred(self) -> Iterator[None]:
        """The others may do something before each single operation of the main stream, not only
        when something is handed over."""
        with _Stirring(self.field):
            yield


class _Stirring(TorchDispatchMode):
    def __init__(self, field: Field) -> None:
        super().__init__()
        self._field = field

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self._field.is_advancing:
            self._field.stir()
        return func(*args, **kwargs or {})
