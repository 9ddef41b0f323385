"""`python -m tools.bench overhead`: what a forward costs beside its experts, from C++ and from
Python with all its checks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from kttrio.cli.flags import parse_flags
from kttrio.config import flag
from kttrio.native import NativeError, Pool
from tools.bench.layers import Expert, RotatingLayers, Shape, routing_of
from tools.bench.programs import find_program
from tools.bench.record import check_place, write_record

TINY = Shape(num_experts=8, top_k=1, hidden_size=256, intermediate_size=256)
FORWARDS = 4000


@dataclass(frozen=True, slots=True)
class OverheadConfig:
    """On how many threads."""

    threads: int | None = flag(None, "workers; default: the cores this process may use", least=1)
    json: Path | None = flag(None, "write the numbers to this file")


def run(argv: Sequence[str]) -> int:
    description = "Measure what a forward costs beside its experts, on 1 thread and on several."
    (config,) = parse_flags("python -m tools.bench overhead", description, argv, [OverheadConfig])
    check_place(config.json)
    try:
        records = measure(config.threads)
    except NativeError as error:
        print(f"tools.bench overhead: {error}", file=sys.stderr)
        return 1
    Console(highlight=False).print(new_table(records))
    write_record(config.json, records)
    return 0


def measure(num_threads: int | None) -> list[dict[str, Any]]:
    with Pool(threads=num_threads) as pool:
        most = pool.num_threads
    return [
        record
        for threads in sorted({1, most})
        for record in (*from_cpp(threads), from_python(threads))
    ]


def from_cpp(num_threads: int) -> list[dict[str, Any]]:
    command = [find_program("kttrio_overhead"), str(num_threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NativeError(f"kttrio_overhead: {done.stderr.strip()}")
    records: list[dict[str, Any]] = json.loads(done.stdout)
    return records


def from_python(num_threads: int) -> dict[str, Any]:
    with Pool(threads=num_threads) as pool:
        experts = [Expert(TINY, "bf16", 0)]
        layers = RotatingLayers(
            pool, TINY, experts, activation="bfloat16", max_tokens=1, least_bytes=1
        )
        routing = routing_of(torch.tensor([[0]]))
        x = torch.randn(1, TINY.hidden_size).to(layers.dtype)
        out, times = torch.empty_like(x), []
        for _ in range(FORWARDS):
            begin = time.perf_counter()
            layers.forward(x, routing, out)
            times.append((time.perf_counter() - begin) * 1e6)
        layers.close()
    times.sort()
    return {
        "threads": num_threads,
        "case": "1 expert, from Python",
        "tokens": 1,
        "pause_us": 0,
        "us": median(times),
        "p99_us": times[len(times) * 99 // 100],
    }


def new_table(records: list[dict[str, Any]]) -> Table:
    table = Table(title="A forward of tiny experts (256 x 256, bf16), us", box=box.SIMPLE_HEAD)
    for heading in ("threads", "experts", "tokens", "pause before", "median", "p99"):
        table.add_column(heading, justify="left" if heading == "experts" else "right")
    for record in records:
        facts = [str(record[name]) for name in ("threads", "case", "tokens", "pause_us")]
        table.add_row(*facts, *(f"{record[name]:.1f}" for name in ("us", "p99_us")))
    return table
