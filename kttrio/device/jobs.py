"""What became of the jobs that were started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakSet

from kttrio.native import Job

STARTED_TWICE = "a captured step can start a job once; make another one"


def check_jobs(started: WeakSet[Job]) -> None:
    """Wait for all, forget them, and raise what went wrong in one; closed ones are past asking."""
    jobs = [job for job in started if job.is_open]
    started.clear()
    raise_first([job.wait for job in jobs])


def raise_first(calls: Sequence[Callable[[], object]]) -> None:
    """Do all, then raise the first that failed."""
    failures: list[Exception] = []
    for call in calls:
        try:
            call()
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]
