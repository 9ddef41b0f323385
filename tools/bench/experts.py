"""`python -m tools.bench experts`: the expert library in every format, beside what the machine can
do at most, measured meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from kttrio.cli.flags import parse_flags
from kttrio.config import ConfigError, flag
from kttrio.native import NativeError, Pool
from kttrio.weights.formats.base import find
from tools.bench.cells import Cell, report_cells
from tools.bench.layers import (
    NUM_DISTINCT,
    SHAPES,
    Expert,
    RotatingLayers,
    Routing,
    draw_routings,
)
from tools.bench.limits import Limits, peak_name
from tools.bench.record import check_place, write_record

FORMATS = ("bf16", "fp8", "int8", "int4")
ACTIVATIONS = ("float32", "bfloat16", "int8")
INT_FORMATS = ("int8", "int4")  # of weights; these also take int8 activations
NUM_ROUTINGS = 16
ROUNDS = 8  # of forwards; between them the machine's read bandwidth is measured
LEAST_FORWARDS = 3
ALL_HUGE = 0.95  # a page or two may be lacking


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """What is measured."""

    shapes: tuple[str, ...] = flag(tuple(SHAPES), "MoE layers of models", choices=tuple(SHAPES))
    formats: tuple[str, ...] = flag(FORMATS, "how the weights are stored", choices=FORMATS)
    activation: tuple[str, ...] = flag(
        (), "what is multiplied; default: the fastest of each format", choices=ACTIVATIONS
    )
    group_size: int | None = flag(
        None,
        "weights with one scale, of int8 and int4; default: the usual of each",
        choices=("32", "64", "128"),
    )
    tokens: tuple[int, ...] = flag((1, 4, 16, 64, 256, 1024), "tokens of a forward", least=1)
    threads: int | None = flag(None, "workers; default: the cores this process may use", least=1)
    isa: tuple[str, ...] = flag(("auto",), "instruction sets, as the library names them")
    gib: float = flag(2.0, "least GiB of weights that forwards rotate over", least=0)
    seconds: float = flag(1.0, "of forwards for each number of tokens", least=0.01)
    json: Path | None = flag(None, "write the numbers to this file")


def run(argv: Sequence[str]) -> int:
    description = "Measure the expert library."
    (config,) = parse_flags("python -m tools.bench experts", description, argv, [ExpertsConfig])
    check_place(config.json)
    console = Console(highlight=False)
    try:
        found = measure_experts(config, console)
    except NativeError as error:
        print(f"tools.bench experts: {error}", file=sys.stderr)
        return 1
    write_record(config.json, {"flags": {**asdict(config), "json": None}, **found})
    return 0


def measure_experts(config: ExpertsConfig, console: Console) -> dict[str, Any]:
    modes = list(chosen_modes(config))
    if not modes:
        activations, formats = ", ".join(config.activation), ", ".join(config.formats)
        raise ConfigError(f"--activation: {activations} is nothing for weights of {formats}")
    num_threads = try_pools(config)
    with Limits(num_threads) as limits:
        report_limits(limits, console)
        cells = list(measure_modes(config, modes, limits, console))
    report_cells(cells, console)
    return {
        "processor": processor(),
        "limits": {"huge_share": limits.huge_share, **limits.rates},
        "cells": [asdict(cell) for cell in cells],
    }


def try_pools(config: ExpertsConfig) -> int:
    """The workers of a pool, once this machine has granted every instruction set of the plan."""
    for isa in config.isa:
        with Pool(threads=config.threads, isa=isa) as pool:
            num_threads = pool.num_threads
    return num_threads


@dataclass(frozen=True, slots=True)
class Mode:
    """How a layer stores and multiplies."""

    weight_format: str
    group_size: int
    activation: str


def chosen_modes(config: ExpertsConfig) -> Iterator[Mode]:
    """Of every format the activations that were asked for and that it has."""
    for weight_format in config.formats:
        is_int = weight_format in INT_FORMATS
        usual = find(weight_format).GROUPS[0]
        group_size = config.group_size if is_int and config.group_size else usual
        for activation in config.activation or ("int8" if is_int else "bfloat16",):
            if activation == "int8" and not is_int:
                continue
            yield Mode(weight_format, group_size, activation)


def measure_modes(
    config: ExpertsConfig, modes: Sequence[Mode], limits: Limits, console: Console
) -> Iterator[Cell]:
    plan = list(product(config.isa, config.shapes, modes))
    # Drawn between the measurements only: a thread that draws takes time from one of the workers.
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        for isa, name, mode in progress.track(plan, description="measuring"):
            with Pool(threads=limits.num_threads, isa=isa) as pool:
                yield from measure_mode(pool, name, mode, config, limits)


def measure_mode(
    pool: Pool, name: str, mode: Mode, config: ExpertsConfig, limits: Limits
) -> Iterator[Cell]:
    shape = SHAPES[name]
    torch.manual_seed(0)
    torch.set_num_threads(pool.num_threads)
    experts = [Expert(shape, mode.weight_format, mode.group_size) for _ in range(NUM_DISTINCT)]
    layers = RotatingLayers(
        pool,
        shape,
        experts,
        activation=mode.activation,
        max_tokens=max(config.tokens),
        least_bytes=config.gib * 2**30,
    )
    for num_tokens in config.tokens:
        routings = draw_routings(shape, num_tokens, NUM_ROUTINGS)
        x = torch.randn(num_tokens, shape.hidden_size).to(layers.dtype)
        error = layers.error(x, routings[0])
        times = time_forwards(layers, x, routings, config.seconds, limits)
        seconds = median(times.seconds)
        yield Cell(
            shape=name,
            weight_format=mode.weight_format,
            group_size=mode.group_size,
            activation=mode.activation,
            isa=pool.isa,
            tokens=num_tokens,
            milliseconds=seconds * 1e3,
            best_milliseconds=min(times.seconds) * 1e3,
            num_forwards=len(times.seconds),
            num_experts=times.num_experts,
            read=times.num_experts * layers.expert_bytes / seconds,
            read_limit=median(times.limits),
            operations=shape.num_operations(num_tokens) / seconds,
            operations_limit=limits.rates[peak_name(pool.isa, mode.activation)],
            error=error,
        )
    layers.close()


@dataclass(slots=True)
class Times:
    """Of the forwards of one cell."""

    seconds: list[float]
    num_touched: list[int]
    limits: list[float]

    @property
    def num_experts(self) -> float:
        return sum(self.num_touched) / len(self.num_touched)


def time_forwards(
    layers: RotatingLayers,
    x: torch.Tensor,
    routings: Sequence[Routing],
    seconds: float,
    limits: Limits,
) -> Times:
    """Rounds of forwards, with a look at the read bandwidth before each."""
    times, out = Times([], [], []), torch.empty_like(x)
    for turn in range(ROUNDS):
        times.limits.append(limits.read_now())
        layers.forward(x, routings[-1], out)  # wakes the workers
        end = time.perf_counter() + seconds / ROUNDS
        while time.perf_counter() < end or len(times.seconds) * ROUNDS <= LEAST_FORWARDS * turn:
            routing = routings[len(times.seconds) % len(routings)]
            begin = time.perf_counter()
            layers.forward(x, routing, out)
            times.seconds.append(time.perf_counter() - begin)
            times.num_touched.append(routing.num_touched)
    return times


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


def report_limits(limits: Limits, console: Console) -> None:
    read = {name: rate for name, rate in limits.rates.items() if name.startswith("read")}
    shown = [f"{name} {rate / 1e9:.1f} GB/s" for name, rate in read.items()]
    peaks = limits.rates.items() - read.items()
    shown += [f"{name} {rate / 1e12:.3f} T" for name, rate in sorted(peaks)]
    console.print(f"{processor()}, {limits.num_threads} threads: " + ", ".join(shown))
    if limits.huge_share < ALL_HUGE:
        console.print(f"only {limits.huge_share:.0%} of memory on 2M pages", style="red")
