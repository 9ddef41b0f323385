"""How a GPU's stream starts a job on the host, and waits for its end, without Python in between.

Either the stream calls functions of the expert library on the host, which takes a detour through a
thread of the driver both times; or the job is submitted before, and counters in pinned memory say
that its input, and then its result, is there. Both can be captured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kttrio.device.base import JobMaker
from kttrio.device.driver import Driver
from kttrio.native import HostFunctions, Job

Handoff: TypeAlias = Literal["host-function", "flags"]

_LINE = 16  # int32 of a cache line: no two flags share one, and all lie alike for kernels
_MOST_JOBS = 1 << 14


class Messenger(Protocol):
    """One way of handing over. `start` and `finish` belong to torch's current stream, whose
    address they are told."""

    def new_job(self, make: JobMaker) -> Job: ...

    def start(self, job: Job, stream: int, *, captured: bool) -> None: ...

    def finish(self, job: Job, stream: int) -> None: ...

    def expect(self, jobs: Iterable[Job]) -> None:
        """These are about to be started, in this order, by a replay."""
        ...


class HostFunctionMessenger:
    def __init__(self, driver: Driver, functions: HostFunctions) -> None:
        self._driver, self._functions = driver, functions

    def new_job(self, make: JobMaker) -> Job:
        return make()

    def start(self, job: Job, stream: int, *, captured: bool) -> None:
        self._driver.launch_host_function(stream, self._functions.submit, job.handle)

    def finish(self, job: Job, stream: int) -> None:
        self._driver.launch_host_function(stream, self._functions.wait, job.handle)

    def expect(self, jobs: Iterable[Job]) -> None:
        """They are submitted by the stream itself."""


@dataclass(frozen=True, slots=True)
class Flags:
    """One job's counters, all int32 [1]."""

    count: Tensor  # on the device: how often its stream has started it
    ready: Tensor  # pinned: the same, for the host
    done: Tensor  # pinned: how often it has run


class FlagMessenger:
    """The host submits a job before its stream starts it; both count how often."""

    def __init__(self, where: torch.device) -> None:
        pinned = where.type == "cuda"  # elsewhere a kernel reads any memory
        shape = _MOST_JOBS, _LINE
        self._count = torch.zeros(shape, dtype=torch.int32, device=where)
        self._ready, self._done = (
            torch.zeros(shape, dtype=torch.int32, pin_memory=pinned) for _ in range(2)
        )
        self._flags: WeakKeyDictionary[Job, Flags] = WeakKeyDictionary()
        self._num_made = 0

    def new_job(self, make: JobMaker) -> Job:
        row = self._num_made
        if row == _MOST_JOBS:
            raise RuntimeError(f"more than {_MOST_JOBS} jobs; hand over by host functions instead")
        self._num_made += 1
        flags = Flags(*(kind[row, :1] for kind in (self._count, self._ready, self._done)))
        job = make(ready=flags.ready, done=flags.done)
        self._flags[job] = flags
        return job

    def start(self, job: Job, stream: int, *, captured: bool) -> None:
        from kttrio.device import flags as kernels  # Triton: only here

        if not captured:
            self.expect([job])
        flags = self._flags[job]
        kernels.announce(flags.count, flags.ready)

    def finish(self, job: Job, stream: int) -> None:
        from kttrio.device import flags as kernels

        flags = self._flags[job]
        kernels.wait(flags.count, flags.done)

    def expect(self, jobs: Iterable[Job]) -> None:
        """A job is submitted again only when it has run: its stream has gone that far already, or
        gets there without us."""
        for job in jobs:
            job.join()
            job.submit()
