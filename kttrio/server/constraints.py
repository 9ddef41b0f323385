"""What answers are held to: a grammar's matcher as a constraint, its work in threads of its own.

The engine, in the event loop, only leaves word there: masks are made while the step computes that
is to draw by them. Grammars are compiled in other threads, for that may take long.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Lock, Thread
from time import monotonic, thread_time
from types import TracebackType
from typing import Protocol, Self

import trio

from kttrio.request import Constraint, Masks
from kttrio.server.errors import ApiError
from kttrio.server.failures import log_failure
from kttrio.text.grammar_error import GrammarError

NUM_THREADS = 4
"""That make masks. Masks take a tenth of a millisecond, and Python a part of that alone."""
MASK_SECONDS = 5.0
"""So long after they were asked for masks are given up: other sequences wait with that one."""
MOST_DEBT = 0.25
"""Seconds of a processor that a grammar may take ahead of its due; the first masks take longest."""
DUE = 0.001
"""Seconds of a processor that are due for each mask; most take a twentieth."""
NUM_COMPILING = 2
"""Grammars that are compiled at the same time."""
MOST_WAITING = 64
"""Grammars that wait for that; one more is refused."""
RETRY_SECONDS = 5.0

logger = logging.getLogger(__name__)


class Matcher(Protocol):
    """Follows one answer through its grammar. One thread at a time. Both raise GrammarError where
    that takes too much."""

    def masks(self, drafts: tuple[int, ...]) -> Sequence[bytes | None]:
        """What may come next and behind each draft, as `request.Masks` has it."""
        ...

    def advance(self, tokens: Sequence[int]) -> None:
        """The answer goes on with these."""
        ...


Matchers = Sequence[Matcher]


class _Job:
    """Masks that are asked for; a `Masks`."""

    def __init__(self, work: Callable[[], Sequence[bytes | None]]) -> None:
        self._work = work
        self._masks: Sequence[bytes | None] | None = None
        self._reason = "the masks of the answer could not be made; the server's log says why"
        self._deadline = monotonic() + MASK_SECONDS
        self._underway = Lock()  # held until the masks are there: the cheapest event there is
        self._underway.acquire()

    def run(self) -> None:
        """Make them. Whatever goes wrong is the business of who waits."""
        try:
            self._masks = self._work()
        except GrammarError as error:
            self._reason = str(error)
        except BaseException as error:  # a panic of the matcher's library is no Exception
            log_failure(logger, "the masks of an answer could not be made", error)
        finally:
            self._underway.release()

    def wait(self) -> Sequence[bytes | None]:
        left = max(self._deadline - monotonic(), 0.0)
        if not self._underway.acquire(timeout=left):
            raise RuntimeError(f"what may come next was not known within {MASK_SECONDS:g} s")
        self._underway.release()
        if self._masks is None:
            raise RuntimeError(self._reason)
        return self._masks


class MaskThreads:
    """Threads that make masks, as they are asked for; they live as long as the `with` block."""

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = [
            Thread(target=self._run, name=f"masks-{number}", daemon=True)  # see `__exit__`
            for number in range(num_threads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Whoever asked before has an answer; nobody may ask any more. A thread that is lost in a
        grammar must not keep the server from its end."""
        for _ in self._threads:
            self._jobs.put(None)
        deadline = monotonic() + MASK_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - monotonic(), 0.0))
        if any(thread.is_alive() for thread in self._threads):
            logger.error("masks are still being made after %g s and are left behind", MASK_SECONDS)

    def begin(self, work: Callable[[], Sequence[bytes | None]]) -> Masks:
        job = _Job(work)
        self._jobs.put(job)
        return job

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # or it keeps its matcher while nothing is asked


class MatchedConstraint:
    """A `Constraint` that follows a grammar.

    What is drawn waits here until masks are asked for. It can happen that these are asked for a
    second time before the first are made, because the step was given up: then they take turns,
    and either takes along what was drawn.

    All sequences of a step wait for the slowest masks. So a grammar that goes on to take much
    longer than others, as ambiguous ones do when the answer grows, ends its own answer.
    """

    def __init__(self, matcher: Matcher, threads: MaskThreads) -> None:
        self._matcher = matcher
        self._threads = threads
        self._drawn: deque[int] = deque()
        self._turn = Lock()
        self._debt = 0.0
        self.complaint: str | None = None
        """Why the grammar cannot be followed any further: its own fault, so the request's."""

    def masks(self, drafts: tuple[int, ...]) -> Masks:
        return self._threads.begin(lambda: self._make(drafts))

    def advance(self, token: int) -> None:
        self._drawn.append(token)

    def _make(self, drafts: tuple[int, ...]) -> Sequence[bytes | None]:
        with self._turn:
            begin = thread_time()
            try:
                masks = self._follow(drafts)
                self._charge(thread_time() - begin, due=DUE * len(masks))
            except GrammarError as error:
                self.complaint = f"The answer cannot follow its grammar any further: {error}"
                raise
            return masks

    def _follow(self, drafts: tuple[int, ...]) -> Sequence[bytes | None]:
        drawn = [self._drawn.popleft() for _ in range(len(self._drawn))]
        if drawn:
            self._matcher.advance(drawn)
        return self._matcher.masks(drafts)

    def _charge(self, seconds: float, *, due: float) -> None:
        self._debt = max(self._debt + seconds - due, 0.0)
        if self._debt > MOST_DEBT:
            raise GrammarError(
                "it takes too long to find out which tokens may come next; make it simpler, above "
                "all where it can be read in several ways"
            )


class Constraints:
    """Holds the answers of one server to their grammars, for as long as the `with` block lasts."""

    def __init__(self) -> None:
        self._threads = MaskThreads()
        self._compiling = trio.CapacityLimiter(NUM_COMPILING)
        self._recalling = trio.CapacityLimiter(NUM_COMPILING)

    def __enter__(self) -> Self:
        self._threads.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._threads.__exit__(kind, error, traceback)

    async def open(
        self, compile: Callable[[], Matchers], *, recall: Callable[[], Matchers | None]
    ) -> list[Constraint]:
        """A constraint for each matcher of a grammar. `recall` is tried first, for it takes little
        time: what is kept does not wait behind grammars that are hard to compile. Both run in
        threads. Raises what they raise, and ApiError where too many wait for their turn."""
        matchers = await trio.to_thread.run_sync(recall, limiter=self._recalling)
        if matchers is None:
            self._check_waiting()
            matchers = await trio.to_thread.run_sync(compile, limiter=self._compiling)
        return [MatchedConstraint(matcher, self._threads) for matcher in matchers]

    def _check_waiting(self) -> None:
        if self._compiling.statistics().tasks_waiting >= MOST_WAITING:
            raise ApiError(
                429,
                f"{MOST_WAITING} requests wait already to have their grammars compiled; try again "
                "later.",
                code="queue_full",
                retry_after=RETRY_SECONDS,
            )
