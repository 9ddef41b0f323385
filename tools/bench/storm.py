"""`python -m tools.bench storm`: what streams feel while others misbehave, in one way after the
other and in all at once, beside what they feel alone."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio
from rich import box
from rich.console import Console
from rich.table import Table

from kttrio.cli.flags import parse_flags
from kttrio.client import Client, ClientError
from kttrio.config import flag
from tools.bench.measure import Target, first_model, percentile, run_level
from tools.bench.record import check_place, write_record
from tools.demo_server import Server, faults, running_server
from tools.soak.trouble import Victim
from tools.soak.troublers import NAMED, misbehaving
from tools.soak.watch import look

FLAGS = ("--stream-write-timeout", "3", "--header-timeout", "3", "--no-access-log")
TOKENS = 64
MIB_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class StormConfig:
    """How hard, and how long."""

    streams: int = flag(4, "streams at the same time whose tokens are timed", least=1)
    troublers: int = flag(8, "clients that misbehave at the same time", least=1)
    seconds: float = flag(10.0, "for each kind of trouble", least=1)
    seed: int = flag(0, "of who does what", least=0)
    json: Path | None = flag(None, "write the numbers to this file")


@dataclass(slots=True)
class Weather:
    """What was felt, and how much memory the server had."""

    name: str
    gaps: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    num_troubles: int = 0

    def row(self) -> dict[str, Any]:
        """Milliseconds and MiB."""
        shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        return {
            "name": self.name,
            "troubles": self.num_troubles,
            "tokens": len(self.gaps),
            **{name: round(percentile(self.gaps, q) * 1e3, 1) for name, q in shares.items()},
            "mib": round(max(self.mib, default=0.0), 1),
            "errors": self.errors,
        }


def run(argv: Sequence[str]) -> int:
    description = "Time the tokens of good clients among bad ones."
    (config,) = parse_flags("python -m tools.bench storm", description, argv, [StormConfig])
    check_place(config.json)
    try:
        return trio.run(_run, config, Console())
    except ClientError as error:
        print(f"tools.bench storm: {error}", file=sys.stderr)
        return 1


async def _run(config: StormConfig, console: Console) -> int:
    each = tuple(NAMED)
    skies = [("calm", ()), *((name, (name,)) for name in each), ("all at once", each)]
    with TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        async with running_server(log, *FLAGS) as server:
            model = await first_model(server.url, None)
            await _warm_up(server, model)
            found = [await _weather(config, server, model, *sky) for sky in skies]
        told = faults(log)
    rows = [weather.row() for weather in found]
    console.print(_table(rows))
    write_record(config.json, {"flags": {**asdict(config), "json": None}, "rows": rows})
    failed = [*told, *(error for row in rows for error in row["errors"])]
    for line in failed:
        console.print(line, style="red", markup=False)
    return int(bool(failed))


async def _warm_up(server: Server, model: str) -> None:
    await run_level(Target(server.url, model, max_tokens=TOKENS), 1, 4, health=False)


async def _weather(
    config: StormConfig, server: Server, model: str, name: str, troubles: Sequence[str]
) -> Weather:
    weather = Weather(name)
    victim = Victim(server.url, server.port, server.grpc_port, model)
    calm = nullcontext(Counter[str]())
    bad = misbehaving(victim, troubles, config.troublers, config.seed) if troubles else calm
    async with bad as outcomes, trio.open_nursery() as nursery:
        nursery.start_soon(_weigh, server, weather)
        await _streams(config, server, model, weather)
        nursery.cancel_scope.cancel()
    weather.num_troubles = outcomes.total()
    weather.errors += [outcome for outcome in outcomes if outcome.startswith("!")]
    return weather


async def _streams(config: StormConfig, server: Server, model: str, weather: Weather) -> None:
    """Streams without a pause, for as long as asked for."""
    target = Target(server.url, model, max_tokens=TOKENS)
    until, round = trio.current_time() + config.seconds, 0
    while trio.current_time() < until:
        level = await run_level(
            target, config.streams, config.streams, seed=(round := round + 1), health=False
        )
        weather.gaps += level.gaps()
        weather.errors += level.errors()


async def _weigh(server: Server, weather: Weather) -> None:
    async with Client(server.url) as client:
        while True:
            weather.mib.append((await look(client, server.pid, 0.0)).rss_mib)
            await trio.sleep(MIB_SECONDS)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    caption = "ms between tokens of streams that behave; the server's largest memory, MiB"
    table = Table(title="Streams among others", caption=caption, box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in ("done", "tokens", "p50", "p99", "max", "MiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = ("troubles", "tokens", "p50", "p99", "max", "mib")
        table.add_row(row["name"], *(str(row[name]) for name in numbers))
    return table
