"""`python -m tools.bench masks`: what it costs to hold answers to a form, with the demo model and
beside a runner that only sleeps, over a vocabulary as large as a model's."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import trio
from rich import box
from rich.console import Console
from rich.table import Table

from kttrio.cli.flags import parse_flags
from kttrio.config import EngineConfig, flag
from kttrio.engine.engine import Engine
from kttrio.plan import Capacity, Chunk, ChunkResult, StepPlan, StepResult, StepRunner
from kttrio.request import Constraint, GenerateRequest, Masks, SamplingParams
from kttrio.runner.masks import wait_for
from kttrio.serve import build_parts
from kttrio.server.constraints import Constraints, Matcher
from kttrio.text.grammar import Form, Grammars, Spec
from tools.bench.record import check_place, write_record
from tools.bench.steps import QuietFace, served_settings
from tools.bench.words import make_tokenizer

PEOPLE = """{"type": "array", "minItems": 200, "items": {"type": "object",
 "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer"},
 "kind": {"enum": ["friend", "foe", "neither"]}, "tags": {"type": "array", "items":
 {"type": "string"}}}, "required": ["name", "age", "kind", "tags"],
 "additionalProperties": false}}"""
SPEC = Spec(Form("json_schema", PEOPLE, "schema"))
MAX_TOKENS = 300
ROUNDS = 5
LEAST_TOKENS = 5
PROMPT = tuple(range(300, 316))


@dataclass(frozen=True, slots=True)
class MasksConfig:
    """How many answers at once, and beside what."""

    streams: int = flag(16, "answers at the same time, beside one alone", least=1)
    seconds: float = flag(10.0, "for each measurement, in five rounds", least=0.1)
    step_ms: float = flag(20.0, "length of a step of the runner that sleeps", least=0)
    vocabulary: int = flag(150_000, "its tokens", least=1000)
    json: Path | None = flag(None, "write the numbers to this file")


@dataclass(frozen=True, slots=True)
class Seen:
    """What was noted in a measurement: seconds each."""

    made: list[float] = field(default_factory=list)
    """The work for a sequence's masks, in the threads that do it."""
    waited: list[float] = field(default_factory=list)
    """What a step waited for all its masks."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A runner, and what holds answers of its vocabulary to a form."""

    name: str
    runner: StepRunner
    grammars: Grammars


class SleepingRunner:
    """Sleeps, without the GIL, and then draws tokens that may come."""

    def __init__(self, num_slots: int, seconds: float, vocab_size: int) -> None:
        context_length = len(PROMPT) + MAX_TOKENS
        self.capacity = Capacity(
            num_slots=num_slots,
            num_pages=num_slots * (context_length // 16 + 1),
            page_size=16,
            context_length=context_length,
            max_step_tokens=8192,
            vocab_size=vocab_size,
        )
        self._seconds = seconds
        self._all = np.full(-(-vocab_size // 8), 255, dtype=np.uint8)
        self._random = np.random.default_rng(0)

    def step(self, plan: StepPlan) -> StepResult:
        time.sleep(self._seconds)
        drawn = [self._draw(chunk) if chunk.sample else () for chunk in plan.chunks]
        return StepResult(tuple(map(ChunkResult, drawn)), self._seconds)

    def _draw(self, chunk: Chunk) -> tuple[int, ...]:
        """The same work, held or free."""
        (mask,) = wait_for(chunk, vocab_size=self.capacity.vocab_size)
        if isinstance(mask, str):
            raise RuntimeError(mask)
        mask = self._all if mask is None else mask
        place = int(self._random.choice(np.flatnonzero(mask)))
        bits = np.flatnonzero(np.unpackbits(mask[place : place + 1], bitorder="little"))
        return (min(8 * place + int(self._random.choice(bits)), self.capacity.vocab_size - 1),)

    def close(self) -> None:
        """Nothing is held."""


class Watch:
    """A runner that notes what each step of another waits for masks."""

    def __init__(self, runner: StepRunner, seen: Seen) -> None:
        self._runner = runner
        self._seen = seen

    @property
    def capacity(self) -> Capacity:
        return self._runner.capacity

    def step(self, plan: StepPlan) -> StepResult:
        waits: list[float] = []
        chunks = tuple(
            chunk._replace(masks=WatchedMasks(chunk.masks, waits)) if chunk.masks else chunk
            for chunk in plan.chunks
        )
        result = self._runner.step(replace(plan, chunks=chunks))
        if waits:
            self._seen.waited.append(sum(waits))
        return result

    def close(self) -> None:
        self._runner.close()


@dataclass(frozen=True, slots=True)
class WatchedMasks:
    masks: Masks
    waits: list[float]

    def wait(self) -> Sequence[bytes | None]:
        begin = time.perf_counter()
        made = self.masks.wait()
        self.waits.append(time.perf_counter() - begin)
        return made


@dataclass(frozen=True, slots=True)
class WatchedMatcher:
    matcher: Matcher
    seen: Seen

    def masks(self, drafts: tuple[int, ...]) -> Sequence[bytes | None]:
        begin = time.thread_time()
        made = self.matcher.masks(drafts)
        self.seen.made.append(time.thread_time() - begin)
        return made

    def advance(self, tokens: Sequence[int]) -> None:
        self.matcher.advance(tokens)


def run(argv: Sequence[str]) -> int:
    description = "Measure what it costs to hold answers to a JSON schema."
    (config,) = parse_flags("python -m tools.bench masks", description, argv, [MasksConfig])
    check_place(config.json)
    records = [
        measure(subject, num_streams, config.seconds)
        for subject in subjects(config)
        for num_streams in sorted({1, config.streams})
    ]
    Console(highlight=False).print(new_table(records))
    write_record(config.json, records)
    return 0


def subjects(config: MasksConfig) -> list[Subject]:
    parts = build_parts(served_settings(config.streams), QuietFace())
    tokenizer = make_tokenizer(config.vocabulary)
    sleeping = SleepingRunner(config.streams, config.step_ms / 1e3, tokenizer.vocab_size)
    return [
        Subject("demo model", parts.runner, parts.model.grammars),
        Subject(
            f"{config.vocabulary} tokens, {config.step_ms:g} ms",
            sleeping,
            Grammars(tokenizer, tokenizer.eos_ids),
        ),
    ]


def measure(subject: Subject, num_streams: int, seconds: float) -> dict[str, Any]:
    """Free and held in turn, several times: whatever else the machine does meets both."""
    seen = Seen()
    free: list[float] = []
    held: list[float] = []
    for _ in range(ROUNDS):
        for rates, watch in ((free, None), (held, seen)):
            rates.append(
                trio.run(_tokens_per_second, subject, num_streams, seconds / ROUNDS, watch)
            )
    return {
        "subject": subject.name,
        "streams": num_streams,
        "free": median(free),
        "held": median(held),
        **{f"made_{name}": value for name, value in spread(seen.made).items()},
        **{f"waited_{name}": value for name, value in spread(seen.waited).items()},
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Microseconds."""
    ordered = sorted(seconds)
    return {"median": median(ordered) * 1e6, "p99": ordered[len(ordered) * 99 // 100] * 1e6}


async def _tokens_per_second(
    subject: Subject, num_streams: int, seconds: float, seen: Seen | None
) -> float:
    """Of all streams together. `seen`: None where they say what they like."""
    runner = subject.runner if seen is None else Watch(subject.runner, seen)
    engine = Engine(runner, EngineConfig(max_running_requests=num_streams))
    with Constraints() as constraints:

        async def hold() -> Constraint | None:
            if seen is None:
                return None
            opener = _opener(subject.grammars, seen)
            return (await constraints.open(opener, recall=lambda: None))[0]

        await hold()  # what is made once for the vocabulary and the grammar
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            for number in range(num_streams):
                nursery.start_soon(_answers, engine, number, hold)
            await _generated(engine, 0.2 * seconds)
            begin = trio.current_time()
            num_tokens = await _generated(engine, seconds)
            took = trio.current_time() - begin
            nursery.cancel_scope.cancel()
    return num_tokens / took


async def _generated(engine: Engine, seconds: float) -> int:
    """The tokens of so many seconds, or of as many more as it takes to have a few."""
    before = engine.stats.generated_tokens
    num_tokens = 0
    while num_tokens < LEAST_TOKENS:
        await trio.sleep(seconds)
        num_tokens = engine.stats.generated_tokens - before
    return num_tokens


def _opener(grammars: Grammars, seen: Seen) -> Callable[[], list[Matcher]]:
    return lambda: [WatchedMatcher(grammars.compile(SPEC).open(), seen)]


async def _answers(
    engine: Engine, number: int, hold: Callable[[], Awaitable[Constraint | None]]
) -> None:
    """One after the other, each as long as the last."""
    sampling = SamplingParams(max_tokens=MAX_TOKENS, seed=number)
    while True:
        request = GenerateRequest(str(number), PROMPT, sampling, constraint=await hold())
        async with engine.open(request, lambda event: None) as stream:
            last = await stream.wait()
        if last.error is not None:
            raise RuntimeError(last.error)


def new_table(records: Sequence[dict[str, Any]]) -> Table:
    title = "Answers held to a JSON schema: tokens/s, and microseconds"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in ("", "streams", "free", "held", "kept", "a mask", "p99", "a step waits", "p99"):
        table.add_column(heading, justify="right" if heading else "left")
    for record in records:
        numbers = ("made_median", "made_p99", "waited_median", "waited_p99")
        table.add_row(
            record["subject"],
            str(record["streams"]),
            f"{record['free']:.0f}",
            f"{record['held']:.0f}",
            f"{record['held'] / record['free']:.1%}",
            *(f"{record[name]:.0f}" for name in numbers),
        )
    return table
