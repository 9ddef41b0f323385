"""The step loop: requests from trio tasks, steps in one thread, events back to the tasks.

What runs when is the scheduler's; what a step computes is the runner's; how events come to who
asked, event_stream.py's. One message of plain data crosses to the thread per step and one comes
back. While the events of a step are delivered the next step runs already, and the one after it
cannot start before that delivery is done: that is the whole back-pressure.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from time import perf_counter

import trio

from kttrio.config import EngineConfig
from kttrio.engine.errors import EngineClosed
from kttrio.engine.event_stream import EventStream, Sink
from kttrio.engine.measures import Measures
from kttrio.engine.scheduler import Events, Scheduler
from kttrio.engine.sequence import Sequence
from kttrio.plan import StepPlan, StepResult, StepRunner
from kttrio.request import FinishReason, GenerateRequest, TokenEvent

_log = logging.getLogger(__name__)

DOUBT_SECONDS = 30.0
"""An idle engine is trusted again so long after a failure: where nobody sends requests to an
unhealthy server, no step would ever prove it well."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment."""

    running: int
    waiting: int
    free_pages: int
    num_pages: int
    free_slots: int
    num_slots: int
    steps: int
    """Steps that ended, failed ones included."""
    failed_steps: int
    last_step_seconds: float
    generated_tokens: int
    preemptions: int
    """Times that a running sequence gave its pages to an older one and went back to the queue."""
    draft_tokens: int
    """Drafts that were verified."""
    accepted_draft_tokens: int
    """Drafts that became output."""
    healthy: bool
    """False before `run`, after it, and from a failed step or passage until the next good one, or
    until it has idled for a while."""
    error: str | None
    """Why it is not healthy."""


class Engine:
    """Continuous batching over one runner. Start `run` in a nursery, then `open` requests.

    The runner belongs to the caller, who closes it after `run` has ended.
    """

    def __init__(self, runner: StepRunner, config: EngineConfig) -> None:
        self._runner = runner
        self._scheduler = Scheduler(runner.capacity, config)
        self._streams: dict[Sequence, EventStream] = {}
        self._plans: SimpleQueue[StepPlan | None] = SimpleQueue()
        self._step_in_flight = False
        self._started = self._alive = False
        self._refusal: str | None = None
        self._failure: Exception | None = None
        self._error: str | None = "the engine has not started yet"
        self._empty = trio.lowlevel.ParkingLot()
        self._steps = self._failed_steps = self._generated_tokens = 0
        self._last_step_seconds = 0.0
        self._failed_at = self._told_at = 0.0
        self.measures = Measures()

    @property
    def longest_sequence(self) -> int:
        """Prompt and output of the longest request that can run, in tokens; more output is cut."""
        return self._scheduler.longest_sequence

    @property
    def most_sequences(self) -> int:
        """Sequences that an idle engine takes at once, running and waiting; one more is refused."""
        return self._scheduler.most_sequences

    @property
    def speculates(self) -> bool:
        """Whether steps draft tokens for those that follow."""
        return self._runner.capacity.num_drafts > 0

    @property
    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_pages=scheduler.num_free_pages,
            num_pages=scheduler.num_pages,
            free_slots=scheduler.num_free_slots,
            num_slots=scheduler.num_slots,
            steps=self._steps,
            failed_steps=self._failed_steps,
            last_step_seconds=self._last_step_seconds,
            generated_tokens=self._generated_tokens,
            preemptions=scheduler.num_preemptions,
            draft_tokens=scheduler.num_drafted,
            accepted_draft_tokens=scheduler.num_accepted,
            healthy=self._error is None or self._is_forgiven,
            error=self._error,
        )

    @property
    def _is_forgiven(self) -> bool:
        doubted = perf_counter() - self._failed_at < DOUBT_SECONDS
        return self._alive and not self._step_in_flight and not doubted

    @asynccontextmanager
    async def open(
        self, request: GenerateRequest, sink: Sink | None = None
    ) -> AsyncIterator[EventStream]:
        """Run a request for as long as the block lasts; leaving it early aborts the request.

        With a `sink` every event is pushed to it as soon as its step is done, in the event
        loop, without waking a task; otherwise iterate over the stream. Raises RequestTooLarge,
        QueueFull or EngineClosed.
        """
        stream = self._submit(request, sink)
        try:
            yield stream
        finally:
            stream.close()

    def begin_drain(self) -> None:
        """Refuse new requests from now on; those that run or wait go on."""
        self._refusal = self._refusal or "the server shuts down and takes no new requests"

    async def drained(self) -> None:
        """Wait until no sequence is left."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._scheduler.is_empty and self._failure is None:
            await self._empty.park()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Compute steps until cancelled; the thread is joined within a step.

        A step that raises costs its own sequences only. Anything else that breaks ends every
        open stream with an error event and is raised from here.
        """
        if self._started:
            raise RuntimeError("an engine runs once; make a new one")
        self._started = self._alive = True
        self._error = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_thread_at_exit)
                self._plan_next()
                task_status.started()
                try:
                    await self._run_thread()
                except Exception as error:
                    self._die(error)
                nursery.cancel_scope.cancel()
        finally:
            self._end_all("the engine was stopped")
            if self._failure is None:
                self._scheduler.clear()
            self._empty.unpark_all()
        if self._failure is not None:
            raise self._failure

    async def _run_thread(self) -> None:
        # A limiter of its own: the thread lives as long as the server and must not take a place
        # from the short-lived ones.
        await trio.to_thread.run_sync(
            self._compute, trio.lowlevel.current_trio_token(), limiter=trio.CapacityLimiter(1)
        )

    async def _stop_thread_at_exit(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._plans.put(None)

    def _compute(self, token: trio.lowlevel.TrioToken) -> None:
        """The compute thread: nothing of the engine is touched here but the queue."""
        while self._compute_step(token):
            pass  # and between steps the last one's images are not kept alive

    def _compute_step(self, token: trio.lowlevel.TrioToken) -> bool:
        """Wait for a plan and compute it; False at the end of all plans."""
        plan = self._plans.get()
        if plan is None:
            return False
        outcome: StepResult | str
        try:
            outcome = self._runner.step(plan)
            if len(outcome.chunks) != len(plan.chunks):
                outcome = f"{len(outcome.chunks)} answers to {len(plan.chunks)} chunks"
        except Exception as error:
            _log.exception("a step of %d chunks failed", len(plan.chunks))
            # As text: the exception would keep the tensors of its frames alive.
            outcome = f"{type(error).__name__}: {error}"
        token.run_sync_soon(self._finish_step, plan, outcome)
        return True

    def _finish_step(self, plan: StepPlan, outcome: StepResult | str) -> None:
        """Back in the event loop. Must not raise: trio would take the whole process down."""
        if not self._alive:
            return
        begun = perf_counter()
        try:
            self._step_in_flight = False
            events = self._commit(plan, outcome)
            self._plan_next()
            self._deliver(events, begun)
            self._notice_empty()
        except Exception as error:
            self._die(error)
        self.measures.deliveries.add(perf_counter() - begun)

    def _commit(self, plan: StepPlan, outcome: StepResult | str) -> Events:
        self._steps += 1
        if isinstance(outcome, str):
            self._failed_steps += 1
            self._failed_at = perf_counter()
            self._error = f"the model step failed: {outcome}"
            return self._scheduler.fail(plan, self._error)
        # What fails on the passage spares the step beside it, but is no less a fault of the runner.
        self._error = outcome.long.error if outcome.long else None
        if self._error is not None:
            self._failed_at = perf_counter()
        self._last_step_seconds = outcome.seconds
        self.measures.note_step(plan, outcome)
        return self._scheduler.commit(plan, outcome)

    def _deliver(self, events: Events, now: float) -> None:
        before, self._told_at, num_steady = self._told_at, now, 0
        for sequence, event in events:
            if event.token is not None:
                self._generated_tokens += 1
            # Absent: another sink has closed the stream a moment ago.
            stream = self._streams.get(sequence)
            if stream is None:
                continue
            if event.token is not None:
                if stream.told_at == before:  # almost all: counted here, measured together
                    num_steady += 1
                elif 0 <= stream.told_at != now:
                    self.measures.gaps.add(now - stream.told_at)
                stream.told_at = now
            if event.finish is not None:
                del self._streams[sequence]
            stream.push(event)
        if num_steady:
            self.measures.gaps.add(now - before, num_steady)

    def _plan_next(self) -> None:
        if not self._alive or self._step_in_flight:
            return
        plan = self._scheduler.plan()
        if plan is not None:
            self._step_in_flight = True
            self._plans.put(plan)
        for sequence in self._scheduler.admitted:
            self._note_queueing(sequence)

    def _note_queueing(self, sequence: Sequence) -> None:
        stream = self._streams.get(sequence)
        if stream is not None and stream.queued_at is not None:
            self.measures.queue.add(perf_counter() - stream.queued_at)
            stream.queued_at = None

    def _submit(self, request: GenerateRequest, sink: Sink | None) -> EventStream:
        if self._refusal is not None:
            raise EngineClosed(self._refusal)
        sequence = self._scheduler.submit(request)
        stream = EventStream(partial(self._leave, sequence), sink)
        self._streams[sequence] = stream
        try:
            self._plan_next()
        except Exception as error:
            self._die(error)
        return stream

    def _leave(self, sequence: Sequence) -> None:
        """A stream ended before its sequence did."""
        if self._streams.pop(sequence, None) is None:
            return
        try:
            self._scheduler.abort(sequence)
            self._plan_next()
            self._notice_empty()
        except Exception as error:
            self._die(error)

    def _notice_empty(self) -> None:
        if self._scheduler.is_empty:
            self._empty.unpark_all()

    def _die(self, error: Exception) -> None:
        """Bookkeeping or thread is broken: trust nothing, tell everyone, let `run` raise."""
        if self._failure is None:
            self._failure = error
            _log.critical("the engine died", exc_info=error)
        self._end_all(f"the engine died: {type(error).__name__}: {error}")
        self._plans.put(None)
        self._empty.unpark_all()

    def _end_all(self, reason: str) -> None:
        if self._alive:
            self._alive = False
            self._error = self._refusal = reason
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.push(TokenEvent(None, FinishReason.ERROR, error=reason))
