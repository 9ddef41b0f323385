"""`python -m tools.bench coverage`: what a budget of experts on the device serves, by strategy.

Two kinds of traffic are recorded: the demo model answers requests, and a model of random weights in
the shape of Qwen3-Next reads texts. frequency is chosen from the first half of the steps; the
dynamic rules begin with the uniform placement and go through the first half; all are judged by the
second. `cold` is the dynamic rule that begins there, and learns while it is judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from kttrio.cli.flags import parse_flags
from kttrio.config import ConfigError, flag
from kttrio.experts.choice import (
    EVERY_TOKENS,
    HALF_LIFE,
    MARGIN,
    DecayedCounts,
    DecayedRule,
    LastChunkRule,
    Rule,
    StepTokens,
    swapped,
)
from kttrio.experts.placement import ExpertGrid, place, plan_budget
from kttrio.experts.recording import RecordingError, read_counts
from kttrio.experts.usage import covered, grid_of
from tools.bench.lines import draw_lines
from tools.bench.record import check_place, write_record
from tools.bench.traffic import STEP_TOKENS, Traffic, demo_traffic, synthetic_traffic

TENTHS = tuple(tenth / 10 for tenth in range(1, 10))
STATIC = ("random", "uniform", "front-loading", "frequency")
DYNAMIC = ("dynamic", "cold", "last-chunk")
SHORT = {"front-loading": "front"}
HINT = (
    "Shares of the activations whose expert is on the device, by the share of experts there. swaps "
    "are those of dynamic, its swaps those of last-chunk."
)


@dataclass(frozen=True, slots=True)
class CoverageConfig:
    """Which traffic, and how it is followed."""

    traffic: tuple[str, ...] = flag(
        ("demo", "synthetic"), "what is recorded", choices=("demo", "synthetic")
    )
    recording: Path | None = flag(None, "recorded activations (.pt file), instead of that")
    top_k: int | None = flag(None, "experts that a token chose in the recording", least=1)
    requests: int = flag(400, "to the demo model; the other one reads a quarter as many", least=4)
    half_life: float = flag(float(HALF_LIFE), "of dynamic, in tokens", least=1)
    margin: float = flag(MARGIN, "of dynamic, in standard deviations", least=0)
    every_tokens: int = flag(EVERY_TOKENS, "tokens between two looks of dynamic", least=1)
    lanes: int = flag(4, "swaps at a time", least=1)
    threshold: int = flag(STEP_TOKENS, "tokens of a step that last-chunk looks at", least=1)
    plot: Path | None = flag(None, "also draw the shares into this PNG file")
    json: Path | None = flag(None, "write the numbers to this file")


@dataclass(frozen=True, slots=True)
class Covered:
    """Shares of the activations whose expert is on the device, 0 to 1, by strategy."""

    ratio: float
    shares: dict[str, float]
    num_swaps: int
    """Of the dynamic rule, over both halves,"""
    num_chunk_swaps: int
    """and of last-chunk."""


def run(argv: Sequence[str]) -> int:
    description = "Measure what experts on the device serve, by strategy and budget."
    (config,) = parse_flags("python -m tools.bench coverage", description, argv, [CoverageConfig])
    check_place(config.json)
    console = Console(highlight=False)
    found = {name: measure(seen, config, name, console) for name, seen in _traffic(config)}
    if config.plot is not None:
        lines = {name: _lines(rows) for name, rows in found.items()}
        draw_lines(lines, x="experts on the device", y="activations served").save(config.plot)
    write_record(config.json, {name: [asdict(row) for row in rows] for name, rows in found.items()})
    return 0


def measure(seen: Traffic, config: CoverageConfig, name: str, console: Console) -> list[Covered]:
    """A row for each tenth, shown."""
    steps = seen.steps[seen.steps.sum((1, 2)) > 0]
    steps = steps[:, grid_of(steps.sum(0)).layers]
    halves = [Traffic(half, seen.top_k) for half in steps.tensor_split(2)]
    rows = [judge(*halves, ratio, config) for ratio in TENTHS]
    num_steps, num_layers, num_experts = steps.shape
    console.print(
        f"\n{name}: {num_layers} layers of {num_experts} experts, {int(steps.sum()):,} activations "
        f"in {num_steps} steps"
    )
    console.print(coverage_table(rows), HINT, sep="\n")
    return rows


def judge(learnt: Traffic, judged: Traffic, ratio: float, config: CoverageConfig) -> Covered:
    """Every strategy with one budget; all layers have experts."""
    past, future, top_k = learnt.steps, judged.steps, learnt.top_k
    grid = ExpertGrid((True,) * past.shape[1], past.shape[2])
    budget = plan_budget(grid, ratio=ratio)
    masks = {name: place(name, grid, budget=budget, counts=past.sum(0)) for name in STATIC}
    shares = {name: covered(mask, future.sum(0)) for name, mask in masks.items()}
    begin = masks["uniform"]
    dynamic, cold = (Follower(_rule(grid, top_k, config), begin, top_k) for _ in range(2))
    # As SGLang does, which has the whole layer at hand: all experts at once.
    large = Follower(LastChunkRule(grid.shape, threshold=config.threshold), begin, top_k)
    for follower, lanes in ((dynamic, config.lanes), (large, budget)):
        follower.follow(past, lanes)
    shares["dynamic"] = dynamic.follow(future, config.lanes)
    shares["cold"] = cold.follow(future, config.lanes)
    shares["last-chunk"] = large.follow(future, budget)
    return Covered(ratio, shares, dynamic.num_swaps, large.num_swaps)


class Follower:
    """A rule that sees step after step, and what is on the device by its word."""

    def __init__(self, rule: Rule, mask: Tensor, top_k: int) -> None:
        self._rule, self._mask, self._top_k = rule, mask, top_k
        self._seen = torch.zeros(mask.shape, dtype=torch.int64)
        self.num_swaps = 0

    def follow(self, steps: Tensor, lanes: int) -> float:
        """The share of the activations that found their expert on the device, of counts [steps,
        layers, experts]; at most `lanes` swaps after each step."""
        served = 0
        for counts in steps:
            served += int(counts[self._mask].sum())
            self._end_step(counts, lanes)
        return served / int(steps.sum())

    def _end_step(self, counts: Tensor, lanes: int) -> None:
        num_tokens = int(counts[0].sum()) // self._top_k
        self._seen += counts
        wants = self._rule.wants(StepTokens(num_tokens, num_tokens))
        if wants:
            self._rule.add(self._seen)
        if wants or self._rule.drops:
            self._seen = torch.zeros_like(self._seen)
        swaps = self._rule.choose(self._mask, lanes)
        self._mask = swapped(self._mask, swaps)
        self.num_swaps += len(swaps)


def coverage_table(rows: Iterable[Covered]) -> Table:
    names = (*STATIC, *DYNAMIC, "swaps", "its swaps")
    columns = (Column(SHORT.get(name, name), justify="right") for name in names)
    table = Table("", *columns, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for row in rows:
        shares = (f"{row.shares[name]:.1%}" for name in (*STATIC, *DYNAMIC))
        table.add_row(f"{row.ratio:.0%}", *shares, f"{row.num_swaps:,}", f"{row.num_chunk_swaps:,}")
    return table


def _rule(grid: ExpertGrid, top_k: int, config: CoverageConfig) -> Rule:
    known = DecayedCounts(torch.zeros(grid.shape), top_k=top_k, half_life=config.half_life)
    return DecayedRule(known, margin=config.margin, every_tokens=config.every_tokens)


def _traffic(config: CoverageConfig) -> Iterator[tuple[str, Traffic]]:
    """By name."""
    if config.recording is not None:
        yield config.recording.name, _read(config.recording, config.top_k)
        return
    if "demo" in config.traffic:
        yield "demo model", demo_traffic(config.requests)
    if "synthetic" in config.traffic:
        yield "random weights", synthetic_traffic(config.requests // 4)


def _read(recording: Path, top_k: int | None) -> Traffic:
    if top_k is None:
        raise ConfigError(
            f"--recording {recording} does not tell how many experts a token chose; give --top-k"
        )
    try:
        return Traffic(read_counts(recording), top_k)
    except (OSError, RecordingError) as error:
        raise ConfigError(f"--recording {recording}: {error}") from error


def _lines(rows: Sequence[Covered]) -> dict[str, list[tuple[float, float]]]:
    return {name: [(row.ratio, row.shares[name]) for row in rows] for name in rows[0].shares}
