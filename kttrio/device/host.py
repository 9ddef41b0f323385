"""A CPU that stands in for the device: the same calls, so the same order of events, without a GPU.

The main stream is the calling thread itself: what it is given is done when the call returns. So is
what other streams are given, until one of them has to wait for a job or another stream: the rest
then stays until somebody waits for it. Jobs that are made here run then, too.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from threading import RLock

from kttrio.device.base import JobMaker
from kttrio.device.twin import Books, Call, Finish, Run, TwinDevice, TwinStream, Wait
from kttrio.native import Job


class HostStream(TwinStream):
    """Handed work by one thread at a time; any other may wait for it."""

    def __init__(self, name: str, books: Books, *, is_main: bool) -> None:
        super().__init__(name, books)
        self._is_main = is_main
        self._left: deque[Call] = deque()
        self._num_given = 0
        self._failure: Exception | None = None
        self._doing = RLock()
        self.num_done = 0

    def reach(self, place: int) -> None:
        """Do what was handed over before this place; what fails is kept, and the rest done."""
        while self.num_done < place:
            with self._doing:
                if self.num_done < place:
                    self._do(self._left.popleft())

    def _do(self, call: Call) -> None:
        try:
            call()
        except Exception as error:
            self._failure = self._failure or error
        finally:
            self.num_done += 1

    def drain(self) -> None:
        self.reach(self._num_given)

    def raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _give(self, call: Call) -> None:
        with self._doing:  # who waits may be doing what came before
            self._num_given += 1
            if not self._is_main and (self._left or _waits(call)):
                self._left.append(call)
                return
            try:
                _do_now(call)
            finally:
                self.num_done += 1

    def _mark(self) -> HostEvent:
        return HostEvent(self, self._num_given)


@dataclass(frozen=True, slots=True)
class HostEvent:
    """After so many calls of a stream."""

    stream: HostStream
    place: int

    @property
    def has_passed(self) -> bool:
        return self.stream.num_done >= self.place

    @property
    def is_done(self) -> bool:
        """Always: nobody else does what is left."""
        self.stream.reach(self.place)
        return True

    def synchronize(self) -> None:
        self.stream.reach(self.place)
        self.stream.raise_failure()


def _do_now(call: Call) -> None:
    """In the mode in which it was handed over."""
    if isinstance(call, Run):
        call.work()
    else:
        call()


def _waits(call: Call) -> bool:
    if isinstance(call, Wait) and isinstance(call.event, HostEvent):
        return not call.event.has_passed
    return isinstance(call, Finish)


class HostDevice(TwinDevice):
    """`Device` of `--device cpu`."""

    def _new_stream(self, name: str, books: Books) -> HostStream:
        return HostStream(name, books, is_main=not self._streams)

    def new_job(self, make: JobMaker) -> Job:
        """One that runs where it is waited for: beside the main stream's work it would only take
        the processor from it."""
        return make(by_waiter=True)
