"""`python -m tools.bench load`: streams at rising concurrency, and what their clients felt."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio
from rich import box
from rich.console import Console
from rich.table import Table

from kttrio.cli.flags import parse_flags
from kttrio.client import ClientError
from kttrio.config import flag
from tools.bench.measure import (
    Level,
    Target,
    first_model,
    in_use,
    percentile,
    run_level,
    wait_until_idle,
)
from tools.bench.record import check_place, write_record

COLUMNS = (
    ("first_token_ms", "p50"),
    ("first_token_ms", "p99"),
    ("inter_token_ms", "p50"),
    ("inter_token_ms", "p99"),
    ("inter_token_ms", "max"),
    ("health_ms", "p50"),
    ("health_ms", "p99"),
)


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """What is asked, and how hard."""

    url: str = flag("http://127.0.0.1:30000", "address of the server")
    api_key: str | None = flag(None, "bearer token the server asks for")
    model: str | None = flag(None, "model name; default: the first one the server lists")
    concurrency: tuple[int, ...] = flag(
        (1, 4, 16, 64), "streams at the same time, one level after the other", least=1
    )
    requests: int | None = flag(None, "requests of each level; default: 3 x concurrency", least=1)
    max_tokens: int = flag(64, "tokens of every answer", least=1)
    prompt_tokens: int = flag(64, "words of every prompt, about as many tokens", least=1)
    temperature: float = flag(1.0, "of every request", least=0, most=2)
    ignore_eos: bool = flag(True, "ask for the full length; off for servers that refuse the field")
    disconnect: float = flag(
        0.0, "share of clients that vanish in the middle of their answer", least=0, most=1
    )
    health: bool = flag(True, "ask /health meanwhile, 20 times a second")
    seconds: float = flag(300.0, "most time for one level", least=1)
    timeout: float = flag(60.0, "a request that is silent for so long has failed", least=0.1)
    seed: int = flag(0, "of the prompts and of who vanishes", least=0)
    json: Path | None = flag(None, "write the numbers to this file")


def run(argv: Sequence[str]) -> int:
    (config,) = parse_flags(
        "python -m tools.bench load", "Load a server over HTTP.", argv, [LoadConfig]
    )
    check_place(config.json)
    try:
        return trio.run(_run, config, Console())
    except ClientError as error:
        print(f"tools.bench load: {error}", file=sys.stderr)
        return 1


async def _run(config: LoadConfig, console: Console) -> int:
    target = Target(
        url=config.url,
        model=config.model or await first_model(config.url, config.api_key),
        api_key=config.api_key,
        max_tokens=config.max_tokens,
        prompt_tokens=config.prompt_tokens,
        temperature=config.temperature,
        ignore_eos=config.ignore_eos,
        timeout=config.timeout,
    )
    await run_level(
        target, 1, 1, seed=-1, health=False
    )  # the first request pays for what is lazy everywhere
    rows = []
    table = new_table(f"{target.model} at {target.url}")
    failures: Counter[str] = Counter()
    for concurrency in config.concurrency:
        level = await _level(config, target, concurrency)
        failures.update(level.errors())
        rows.append(summary(level))
        add_row(table, rows[-1])
    console.print(table)
    for message, count in failures.most_common(5):
        console.print(f"{count} x {message}", style="red", markup=False)
    left = await _report_left(target, console)
    record = {"flags": {**asdict(config), "json": None}, "levels": rows, "left": left}
    write_record(config.json, record)
    return 1 if failures or any(left.values()) else 0


async def _level(config: LoadConfig, target: Target, concurrency: int) -> Level:
    num_requests = config.requests or 3 * concurrency
    with trio.move_on_after(config.seconds) as scope:
        return await run_level(
            target,
            concurrency,
            num_requests,
            disconnect=config.disconnect,
            seed=config.seed,
            health=config.health,
        )
    assert scope.cancelled_caught
    raise ClientError(f"level {concurrency} took longer than --seconds {config.seconds:g}")


def summary(level: Level) -> dict[str, Any]:
    """The numbers of a level; milliseconds and tokens per second."""
    waits, gaps = level.waits(), level.gaps()
    return {
        "concurrency": level.concurrency,
        "requests": len(level.streams),
        "errors": len(level.errors()),
        "vanished": level.num_vanished(),
        "prompt_tokens": sum(stream.num_prompt_tokens for stream in level.streams),
        "output_tokens": level.num_tokens(),
        "seconds": level.seconds,
        "tokens_per_second": level.num_tokens() / level.seconds,
        "first_token_ms": {"p50": _ms(waits, 0.5), "p99": _ms(waits, 0.99)},
        "inter_token_ms": {"p50": _ms(gaps, 0.5), "p99": _ms(gaps, 0.99), "max": _ms(gaps, 1)},
        "health_ms": {"p50": _ms(level.health, 0.5), "p99": _ms(level.health, 0.99)},
        "health_samples": len(level.health),
        "health_errors": level.health_errors,
    }


def _ms(values: Sequence[float], share: float) -> float | None:
    return round(percentile(values, share) * 1e3, 3) if values else None


def new_table(title: str) -> Table:
    caption = "ms, p50 and p99: first token, next token (max: longest gap), /health"
    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False
    )
    for heading in (
        *("users", "done", "failed", "gone", "tok/s"),
        *("first", "p99", "next", "p99", "max", "/health", "p99"),
    ):
        table.add_column(heading, justify="right")
    return table


def add_row(table: Table, row: dict[str, Any]) -> None:
    times = [row[name][share] for name, share in COLUMNS]
    table.add_row(
        *(str(row[name]) for name in ("concurrency", "requests", "errors", "vanished")),
        *(_show(value) for value in (row["tokens_per_second"], *times)),
    )


def _show(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


async def _report_left(target: Target, console: Console) -> dict[str, int]:
    """What the server says is still in use; nothing where it does not tell."""
    try:
        left = in_use(await wait_until_idle(target, 10.0))
    except ClientError as error:
        console.print(f"the server does not tell what is in use: {error}", markup=False)
        return {}
    console.print("in use afterwards: " + ", ".join(f"{n} {name}" for name, n in left.items()))
    return left
