"""What the server holds, seen from outside: memory, threads, files, tasks, and its own counts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import trio

from kttrio.client import Client
from tools.bench.measure import in_use

FAILED = re.compile(r'^http_requests_total\{.*handler="([^"]*)".*status="(5\d\d)"\} (\S+)', re.M)
TASKS = re.compile(r"^kttrio:tasks\{.*\} (\S+)", re.M)
FEWEST = 10
"""Samples of which a third must consist."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look."""

    seconds: float
    rss_mib: float
    threads: int
    files: int
    tasks: int
    requests: int
    pages: int
    slots: int
    failed: dict[str, float]
    """Answers with a 5xx since the start, by status and route."""

    def held(self) -> dict[str, int]:
        """What an idle server holds none of, or as much as before."""
        names = ("requests", "pages", "slots", "tasks", "files", "threads")
        return {name: getattr(self, name) for name in names}


async def look(client: Client, pid: int, started: float) -> Sample:
    """Raises ClientError where the server does not tell."""
    info: dict[str, Any] = await client.get_json("/get_server_info")
    told = (await client.get_bytes("/metrics", limit=1 << 20)).decode()
    tasks = TASKS.search(told)
    assert tasks is not None
    return Sample(
        seconds=trio.current_time() - started,
        rss_mib=_status(pid, "VmRSS") / 1024,
        threads=_status(pid, "Threads"),
        files=_num_files(pid),
        tasks=int(float(tasks[1])),
        failed={f"{code} {route}": float(n) for route, code, n in FAILED.findall(told)},
        **in_use(info),
    )


def _status(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+)", text, re.M)
    assert found is not None
    return int(found[1])


def _num_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def growth(samples: list[Sample]) -> dict[str, float]:
    """By which share the memory grew from the first third of the samples to the last: the least of
    each, which no request holds; their middles and their peaks; nothing of too few. Long prompts
    take and give back hundreds of MiB, so what was lost for good shows in the least."""
    third = len(samples) // 3
    if third < FEWEST:
        return {}
    first, last = ([one.rss_mib for one in part] for part in (samples[:third], samples[-third:]))
    shapes = {"least": min, "middle": median, "peak": max}
    return {name: round(shape(last) / shape(first) - 1, 4) for name, shape in shapes.items()}


def leaks(before: Sample, after: Sample) -> dict[str, int]:
    """What an idle server holds more of than it did, by name."""
    was, now = before.held(), after.held()
    return {name: now[name] - was[name] for name in now if now[name] > was[name]}
