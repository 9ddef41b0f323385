"""`python -m tools.bench soak`: for minutes, all protocols at once on the demo model, beside
clients that vanish, read slowly, or send what nobody should. Every greedy answer is compared with
what the server says when it does nothing else, and what it holds at the end with what it held."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio
from rich.console import Console

from kttrio.cli.flags import parse_flags
from kttrio.client import Client, ClientError
from kttrio.config import flag
from tools.bench.measure import first_model
from tools.bench.record import check_place, write_record
from tools.demo_server import Server, faults, running_server
from tools.soak.questions import questions
from tools.soak.talkers import Tally, Topic, talk, topics
from tools.soak.trouble import TROUBLES, Victim
from tools.soak.watch import Sample, growth, leaks, look
from tools.soak.ways import ways

SAMPLE_SECONDS = 5.0
SHOWN = 12
"""Of so many samples one is shown."""
IDLE_SECONDS = 90.0
IDLE_PAUSE = 15.0
"""Longer than unused threads live, and idle connections."""
FLAGS = (
    # Few pages, so that sequences are put back, and memory that is all touched soon.
    *("--max-running-requests", "12", "--max-total-tokens", "6144", "--context-length", "1024"),
    *("--max-queued-requests", "48", "--max-connections", "256", "--max-body-bytes", "2097152"),
    *("--stream-write-timeout", "3", "--header-timeout", "3", "--body-timeout", "5"),
    *("--idle-timeout", "10", "--no-access-log"),
)
"""Limits that are soon reached."""
MOST_GROWTH = 0.02


@dataclass(frozen=True, slots=True)
class SoakConfig:
    """How long and how hard."""

    minutes: float = flag(30.0, "how long the load lasts", least=0.05)
    warm_up: float = flag(5.0, "minutes before memory is compared", least=0)
    talkers: int = flag(10, "clients whose answers are compared", least=1)
    troublers: int = flag(6, "clients that misbehave", least=0)
    seed: int = flag(0, "of who does what", least=0)
    json: Path | None = flag(None, "write the numbers to this file")
    log: Path | None = flag(None, "keep the server's log in this file")


@dataclass(slots=True)
class Course:
    """What the server held before, meanwhile and afterwards."""

    before: Sample
    samples: list[Sample]
    after: Sample
    faults: list[str]
    """Lines of the server's log that tell of its own."""

    def verdicts(self, warm_up: float) -> dict[str, Any]:
        warm = [one for one in self.samples if one.seconds >= warm_up * 60]
        return {
            "growth": growth(warm),
            "leaks": leaks(self.before, self.after),
            "failed": self.after.failed,
            "faults": self.faults,
        }


def run(argv: Sequence[str]) -> int:
    description = "Mixed and hostile load for long, and what it leaves behind."
    (config,) = parse_flags("python -m tools.bench soak", description, argv, [SoakConfig])
    check_place(config.json)
    check_place(config.log)
    try:
        return trio.run(_run, config, Console(highlight=False))
    except ClientError as error:
        print(f"tools.bench soak: {error}", file=sys.stderr)
        return 1


async def _run(config: SoakConfig, console: Console) -> int:
    tally = Tally()
    with TemporaryDirectory() as folder:
        log = config.log or Path(folder, "server.log")
        async with running_server(log, *FLAGS) as server:
            model = await first_model(server.url, None)
            known = await topics(server, ways(model), questions())
            console.print(f"{len(known)} answers are known")
            before = await _idle(server)
            _show(console, before)
            samples: list[Sample] = []
            with trio.move_on_after(config.minutes * 60):
                async with trio.open_nursery() as nursery:
                    _send_clients(nursery, config, server, Crowd(model, known, tally))
                    await _watch(server, samples, tally, console)
            after = await _idle(server)
            _show(console, after)
        course = Course(before, samples, after, faults(log))
    return _report(config, tally, course, console)


@dataclass(frozen=True, slots=True)
class Crowd:
    """What clients do, and what comes of it."""

    model: str
    known: list[Topic]
    tally: Tally


def _send_clients(nursery: trio.Nursery, config: SoakConfig, server: Server, crowd: Crowd) -> None:
    dice = random.Random(config.seed)
    victim = Victim(server.url, server.port, server.grpc_port, crowd.model)
    for _ in range(config.talkers):
        own = random.Random(dice.random())
        nursery.start_soon(talk, server.url, crowd.known, own, crowd.tally)
    for _ in range(config.troublers):
        nursery.start_soon(_trouble, victim, random.Random(dice.random()), crowd.tally)


async def _trouble(victim: Victim, dice: random.Random, tally: Tally) -> None:
    """One bad thing after the other, until cancelled."""
    weights, troubles = zip(*TROUBLES, strict=True)
    while True:
        (trouble,) = dice.choices(troubles, weights)
        try:
            outcome = await trouble(victim, dice)
        except (ClientError, OSError, trio.BrokenResourceError) as error:
            tally.note(f"{trouble.__name__}: {type(error).__name__}")
            continue
        if outcome.startswith("!"):
            tally.find(trouble.__name__, outcome[1:])
        else:
            tally.note(outcome)


async def _watch(server: Server, samples: list[Sample], tally: Tally, console: Console) -> None:
    started = trio.current_time()
    async with Client(server.url) as client:
        while True:
            await trio.sleep(SAMPLE_SECONDS)
            samples.append(await look(client, server.pid, started))
            if len(samples) % SHOWN == 0:
                _show(console, samples[-1])
                console.print(tally.line)


async def _idle(server: Server) -> Sample:
    """What is held when nobody asks for anything, and what was left is closed."""
    started = trio.current_time()
    best: Sample | None = None
    while trio.current_time() < started + IDLE_SECONDS:
        async with Client(server.url) as client:
            found = await look(client, server.pid, started)
        if best is not None and found.held() == best.held() and not found.requests:
            return found
        best = found
        await trio.sleep(IDLE_PAUSE)
    assert best is not None
    return best


def _show(console: Console, sample: Sample) -> None:
    held = ", ".join(f"{count} {name}" for name, count in sample.held().items())
    line = f"{sample.seconds:6.0f} s  {sample.rss_mib:7.1f} MiB, {held}"
    console.print(line, soft_wrap=True)


def _report(config: SoakConfig, tally: Tally, course: Course, console: Console) -> int:
    for outcome, count in sorted(tally.outcomes.items()):
        console.print(f"{count:8} {outcome}")
    for finding in tally.findings:
        console.print(f"FOUND {finding}", style="red", markup=False, soft_wrap=True)
    verdicts = course.verdicts(config.warm_up)
    for name, verdict in verdicts.items():
        console.print(f"{name}: {verdict}", markup=False, soft_wrap=True)
    write_record(
        config.json,
        {
            "flags": {**asdict(config), "json": None, "log": None},
            "outcomes": dict(tally.outcomes),
            "findings": tally.findings,
            "samples": [asdict(one) for one in (course.before, *course.samples, course.after)],
            **verdicts,
        },
    )
    return int(_is_bad(tally, verdicts))


def _is_bad(tally: Tally, verdicts: dict[str, Any]) -> bool:
    grown = verdicts["growth"].get("least", 0.0)
    others = (tally.findings, verdicts["leaks"], verdicts["failed"], verdicts["faults"])
    return grown > MOST_GROWTH or any(others)
