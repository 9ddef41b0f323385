"""`python -m tools.bench drafts`: what a step with drafts costs, and when it pays.

The model is a small Qwen3-Next of random weights, so that its drafts are all but always refused:
every step pays the full price and brings one token. Break-even and gains are arithmetic from these
prices. An accepted draft would add its row to the prediction layer's next pass. That layer and the
recurrent states weigh more beside the rest than in a large model, whose layers are many and wide.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from kttrio.cli.flags import parse_flags
from kttrio.config import EngineConfig, ExpertConfig, ModelConfig, RunnerConfig, flag
from kttrio.plan import Chunk, ChunkResult, StepPlan, StepRunner
from kttrio.request import SamplingParams
from kttrio.runner.build import build_runner
from tools import synthetic
from tools.bench.record import check_place, write_record
from tools.bench.steps import PROMPT_TOKENS, TOP_P

# Half the width of Qwen3-Next-80B-A3B and an eighth of its layers; an expert in 16 is used. The
# head, which every draft passes, is a tenth of what a token reads, as it is there.
SHAPE: dict[str, Any] = synthetic.config(layers=6, experts=64, hidden=1024, intermediate=256) | {
    "vocab_size": 8192,
    "num_experts_per_tok": 4,
    "shared_expert_intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
SHARD_LIMIT = 1_000_000_000
MOST_DRAFTS = 3
# Drafts wanted of each step of a round: for every N one that only begins, one that verifies and
# drafts N, one that verifies N; and before them a plain step.
ROUND = (0, *(wanted for n in range(1, MOST_DRAFTS + 1) for wanted in (n, n, 0)))
ACCEPTANCES = (0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True)
class DraftsConfig:
    """What is measured."""

    sequences: tuple[int, ...] = flag((1, 4, 16), "sequences decoded together", least=1)
    rounds: int = flag(15, "steps of each kind, taken in turn", least=5, most=150)
    method: str = flag("bf16", "format of the experts", choices=("bf16", "int8", "int4"))
    threads: int | None = flag(None, "of the experts; default: one for each core", least=1)
    json: Path | None = flag(None, "write the numbers to this file")

    @property
    def tokens(self) -> int:
        """Of a sequence at most, should all drafts stand."""
        return PROMPT_TOKENS + self.rounds * sum(1 + wanted for wanted in ROUND)


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of step; milliseconds are medians."""

    sequences: int
    drafts: int
    """Of each sequence; verified, and as many made. 0: a plain step."""
    step: float
    drafting: float
    """Part of `step`: by how much it exceeds one that only verifies."""
    price: float
    """In plain steps: so many tokens of each sequence it must bring to be worth it."""
    break_even: float | None
    """The acceptance that brings as many; None: not even all drafts do."""


class Sequences:
    """Decoded together, step by step; some steps draft."""

    def __init__(self, runner: StepRunner, num_sequences: int, num_tokens: int) -> None:
        self._runner = runner
        self.num_drafted = self.num_accepted = 0
        num_pages = -(-num_tokens // runner.capacity.page_size)
        dice = random.Random(0)
        vocabulary = range(runner.capacity.vocab_size)
        self._chunks = [
            Chunk(
                slot=slot,
                start=0,
                token_ids=tuple(dice.choices(vocabulary, k=PROMPT_TOKENS)),
                pages=tuple(range(slot * num_pages, (slot + 1) * num_pages)),
                sampling=SamplingParams(max_tokens=num_tokens, seed=slot, top_p=TOP_P),
                sample=True,
                num_prompt_tokens=PROMPT_TOKENS,
            )
            for slot in range(num_sequences)
        ]
        self.step(0)

    def step(self, wanted: int) -> tuple[int, float]:
        """How many drafts the sequences had, and the seconds of a step that makes `wanted`.

        Now and then a draft stands; its sequence has fewer of the next, the others all of them.
        """
        had = max(chunk.num_drafts for chunk in self._chunks)
        # One known token stands, and the one drawn after it: drafts come from the next place on.
        chunks = [
            chunk._replace(draft_end=chunk.start + 2 + wanted if wanted else 0)
            for chunk in self._chunks
        ]
        result = self._runner.step(StepPlan(tuple(chunks)))
        self.num_drafted += sum(chunk.num_drafts for chunk in chunks)
        self.num_accepted += sum(len(found.tokens) - 1 for found in result.chunks)
        self._chunks = [*map(_after, chunks, result.chunks)]
        return had, result.seconds


def _after(chunk: Chunk, found: ChunkResult) -> Chunk:
    settled = len(chunk.token_ids) - chunk.num_drafts + len(found.tokens) - 1
    return chunk._replace(
        start=chunk.start + settled,
        token_ids=(found.tokens[-1], *found.drafts),
        num_drafts=len(found.drafts),
    )


def run(argv: Sequence[str]) -> int:
    description = "Measure what drafts cost and when they pay."
    (config,) = parse_flags("python -m tools.bench drafts", description, argv, [DraftsConfig])
    check_place(config.json)
    cells = measure_drafts(config, Console(highlight=False))
    record = {"flags": {**asdict(config), "json": None}, "cells": [asdict(cell) for cell in cells]}
    write_record(config.json, record)
    return 0


def measure_drafts(config: DraftsConfig, console: Console) -> list[Cell]:
    with TemporaryDirectory(prefix="kttrio-drafts-") as scratch:
        runner = load(config, Path(scratch))
        cells: list[Cell] = []
        drafted = accepted = 0
        for number in config.sequences:
            sequences = Sequences(runner, number, config.tokens)
            cells += measure(sequences, number, config.rounds)
            drafted += sequences.num_drafted
            accepted += sequences.num_accepted
        runner.close()
    console.print(new_table(cells, f"{accepted} of {drafted} drafts stood"))
    return cells


def load(config: DraftsConfig, scratch: Path) -> StepRunner:
    """Write the checkpoint and load it, with room for all that is measured."""
    directory = scratch / "model"
    synthetic.write_checkpoint(directory, SHAPE, shard_limit=SHARD_LIMIT, mtp=True)
    most = max(config.sequences)
    engine = EngineConfig(
        chunked_prefill_size=most * PROMPT_TOKENS,
        max_running_requests=most,
        context_length=config.tokens,
        speculative_algorithm="MTP",
        speculative_num_draft_tokens=MOST_DRAFTS,
    )
    experts = ExpertConfig(
        kt_method=config.method, kt_cache_dir=scratch / "cache", kt_cpuinfer=config.threads
    )
    return build_runner(RunnerConfig(ModelConfig(model=directory), experts, engine))


def measure(sequences: Sequences, num_sequences: int, num_rounds: int) -> list[Cell]:
    """Rounds of all kinds of steps; the first is for warming up."""
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    for number in range(num_rounds):
        for wanted in ROUND:
            had, seconds = sequences.step(wanted)
            if number:
                times[had, wanted].append(seconds * 1e3)
    plain = median(times[0, 0])
    cells = [Cell(num_sequences, 0, plain, 0.0, 1.0, 0.0)]
    for drafts in range(1, MOST_DRAFTS + 1):
        step, verifying = median(times[drafts, drafts]), median(times[drafts, 0])
        even = break_even(step / plain, drafts)
        cells.append(
            Cell(num_sequences, drafts, step, max(step - verifying, 0.0), step / plain, even)
        )
    return cells


def expected_tokens(acceptance: float, num_drafts: int) -> float:
    """Of a sequence in a step: one, and each draft that stands as all before it do.

    `acceptance`: how often a draft stands where those before it do.
    """
    return sum(acceptance**n for n in range(num_drafts + 1))


def break_even(price: float, num_drafts: int) -> float | None:
    """The acceptance at which a step of that price, in plain steps, brings as many tokens."""
    if price > num_drafts + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, num_drafts) < price else (low, middle)
    return high if price > 1 else 0.0


def new_table(cells: Sequence[Cell], stood: str) -> Table:
    table = Table(
        title="Steps with drafts of random weights",
        caption=f"{stood}. Milliseconds of a step and of its drafting; the price is in plain "
        "steps. Arithmetic, not run: the break-even, and at acceptances the tokens a second "
        "beside those of plain steps",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    measured = ("sequences", "drafts", "ms", "drafting", "price", "break-even")
    for heading in (*measured, *(f"{share:.0%}" for share in ACCEPTANCES)):
        table.add_column(heading, justify="right")
    for cell in cells:
        table.add_row(*shown(cell), end_section=cell.drafts == MOST_DRAFTS)
    return table


def shown(cell: Cell) -> Iterator[str]:
    yield str(cell.sequences)
    yield str(cell.drafts)
    yield f"{cell.step:.2f}"
    if not cell.drafts:
        return
    yield f"{cell.drafting:.2f} {cell.drafting / cell.step:4.0%}"
    yield f"{cell.price:.2f}"
    yield "never" if cell.break_even is None else f"{cell.break_even:.0%}"
    for share in ACCEPTANCES:
        yield f"{expected_tokens(share, cell.drafts) / cell.price:.2f}"
