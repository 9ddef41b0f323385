"""A CUDA device: torch's streams, events and graphs, and jobs of the host among them.

Nothing here looks at a value or computes. What is handed over runs when the GPU comes to it, so an
exception of Python comes up at once, one of a job later.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast
from weakref import WeakSet

import torch
from torch import Tensor

from kttrio.device.base import Event, JobMaker, Work
from kttrio.device.driver import open_driver
from kttrio.device.handoff import FlagMessenger, Handoff, HostFunctionMessenger, Messenger
from kttrio.device.jobs import STARTED_TWICE, check_jobs
from kttrio.native import Job, host_functions


class CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    @property
    def is_done(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        self.event.synchronize()


class CudaStream:
    """One of torch's streams; without one, the stream that is current when it is used."""

    def __init__(self, name: str, device: CudaDevice, stream: torch.cuda.Stream | None) -> None:
        self.name = name
        self._device, self._stream = device, stream

    @property
    def stream(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self._device.where)

    def run(self, work: Work) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def start(self, job: Job) -> None:
        with torch.cuda.stream(self._stream):
            self._device.start(job, self.stream.cuda_stream)

    def finish(self, job: Job) -> None:
        with torch.cuda.stream(self._stream):
            self._device.messenger.finish(job, self.stream.cuda_stream)

    def record(self) -> CudaEvent:
        event = torch.cuda.Event(blocking=True)  # who waits sleeps: the cores are the experts'
        event.record(self.stream)
        return CudaEvent(event)

    def wait(self, event: Event) -> None:
        self.stream.wait_event(cast("CudaEvent", event).event)


class CudaGraph:
    """A captured piece of work, and the jobs that it starts, which must stay open."""

    def __init__(self, graph: torch.cuda.CUDAGraph, jobs: list[Job], device: CudaDevice) -> None:
        self._graph, self._jobs, self._device = graph, jobs, device

    def replay(self) -> None:
        if not all(job.is_open for job in self._jobs):
            raise RuntimeError("a job of this captured step is closed; capture the step again")
        self._device.expect(self._jobs)
        self._graph.replay()


class CudaDevice:
    """`Device` of `--device cuda`. Used from one thread at a time."""

    def __init__(
        self, where: torch.device | None = None, *, handoff: Handoff = "host-function"
    ) -> None:
        """`where` names a GPU by its number; default: torch's current one. DriverError where
        streams cannot start jobs."""
        self.where = where = where or torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(where)
        self.main = CudaStream("main", self, None)
        self.messenger = _messenger(where, handoff)
        self._pool = torch.cuda.graph_pool_handle()
        # One for all captures: libraries keep some megabytes for each stream they have seen, and
        # the allocator gives a stream's memory to no other.
        self._aside = torch.cuda.Stream(where)
        self._started: WeakSet[Job] = WeakSet()
        self._captured: list[Job] | None = None

    @property
    def is_capturing(self) -> bool:
        return self._captured is not None

    def open_stream(self, name: str) -> CudaStream:
        return CudaStream(name, self, torch.cuda.Stream(self.where))

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def new_job(self, make: JobMaker) -> Job:
        return self.messenger.new_job(make)

    def start(self, job: Job, stream: int) -> None:
        """Of torch's current stream, which has this address."""
        if self._captured is None:
            self._started.add(job)
        elif job in self._captured:
            raise RuntimeError(STARTED_TWICE)
        else:
            self._captured.append(job)
        self.messenger.start(job, stream, captured=self.is_capturing)

    def expect(self, jobs: Iterable[Job]) -> None:
        """A replay is about to start these."""
        self._started.update(jobs)
        self.messenger.expect(jobs)

    def capture(self, work: Work) -> CudaGraph:
        """It runs once before, so that libraries and compilers have done what they do at first.

        Graphs share the memory of what they compute on the way: a replay spoils what another one
        left there.
        """
        with torch.inference_mode():
            self._warm_up(work)
            graph, jobs = torch.cuda.CUDAGraph(), self._begin()
            try:
                # Other threads of the server may use the GPU meanwhile.
                with torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._aside,
                    capture_error_mode="thread_local",
                ):
                    work()
            finally:
                self._captured = None
        return CudaGraph(graph, jobs, self)

    def _warm_up(self, work: Work) -> None:
        """Not on the default stream, whose kernels may take memory that a graph must not have."""
        self._aside.wait_stream(torch.cuda.current_stream(self.where))
        with torch.cuda.stream(self._aside):
            work()
        torch.cuda.current_stream(self.where).wait_stream(self._aside)
        self.synchronize()

    def _begin(self) -> list[Job]:
        if self._captured is not None:
            raise RuntimeError("a captured step may not capture another one")
        self._captured = []
        return self._captured

    def check_jobs(self) -> None:
        check_jobs(self._started)

    def synchronize(self) -> None:
        if self.is_capturing:
            raise RuntimeError("a captured step may not wait for the device")
        torch.cuda.synchronize(self.where)
        self.check_jobs()


def _messenger(where: torch.device, handoff: Handoff) -> Messenger:
    if handoff == "flags":
        return FlagMessenger(where)
    return HostFunctionMessenger(open_driver(), host_functions())
