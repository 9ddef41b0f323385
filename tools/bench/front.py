"""`python -m tools.bench front`: what the HTTP side and the engine cost, beside a runner that
only sleeps, and a plain asyncio server of the same shape. The clients run in a process of their
own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import trio
from rich.console import Console

from kttrio.cli.flags import parse_flags
from kttrio.config import flag
from kttrio.plan import Capacity, ChunkResult, StepPlan, StepResult
from kttrio.serve import Settings, load_text
from tools.bench.steps import Recorder, Times, run_bare, run_served, steady

FIRST_TOKEN = 300  # from here on the demo tokenizer has plain pieces of text
VOCAB_SIZE = 8192  # at least the demo tokenizer's


@dataclass(frozen=True, slots=True)
class FrontConfig:
    """How many streams, and how long the runner sleeps."""

    streams: int = flag(64, "streams at the same time", least=1)
    step_ms: float = flag(20.0, "length of a step", least=0)
    max_tokens: int = flag(300, "tokens of every stream", least=20)


class SleepingRunner:
    """Every step takes the same time without the GIL, like one call into C++."""

    def __init__(self, capacity: Capacity, seconds: float) -> None:
        self.capacity = capacity
        self._seconds = seconds

    def step(self, plan: StepPlan) -> StepResult:
        time.sleep(self._seconds)
        results = [
            ChunkResult((FIRST_TOKEN + (chunk.start * 7 + chunk.slot) % 256,))
            if chunk.sample
            else ChunkResult(())
            for chunk in plan.chunks
        ]
        return StepResult(tuple(results), self._seconds)

    def close(self) -> None:
        """Nothing is held."""


def run(argv: Sequence[str]) -> int:
    description = "Measure the cost of serving."
    (config,) = parse_flags("python -m tools.bench front", description, argv, [FrontConfig])
    return trio.run(_run, config, Console(highlight=False))


async def _run(config: FrontConfig, console: Console) -> int:
    model = load_text(Settings())
    context_length = config.max_tokens + 1024
    capacity = Capacity(
        num_slots=config.streams,
        num_pages=config.streams * context_length // 16 + config.streams,
        page_size=16,
        context_length=context_length,
        max_step_tokens=8192,
        vocab_size=VOCAB_SIZE,
    )
    runner = SleepingRunner(capacity, config.step_ms / 1e3)
    bare = await trio.to_thread.run_sync(run_bare, runner, config.streams, 100)
    recorder = Recorder(runner)
    reading = await run_served(recorder, model, config.streams, config.max_tokens)
    served = steady(recorder.steps, config.streams)
    report(console, config.streams, bare, served)
    cpu = served.cpu_seconds_per_token - bare.cpu_seconds_per_token
    kernel = served.kernel_seconds_per_token - bare.kernel_seconds_per_token
    load = cpu * config.streams / served.step_seconds
    console.print(f"CPU of serving    {_cost(cpu, kernel)}: {load:.1%} of a core")
    delays = reading.delays(recorder)
    middle, late = (delays[int(len(delays) * share)] * 1e3 for share in (0.5, 0.99))
    console.print(f"token to client   {middle:.2f} ms after its step, p99 {late:.2f}")
    for style, name in (("queues", "plain asyncio"), ("writes", "writes alone")):
        console.print(f"{name:<17} {_cost(*await _plain(style, config))}")
    return 1 if reading.failed else 0


def _cost(cpu: float, kernel: float) -> str:
    return f"{cpu * 1e6:.1f} us per token and stream, {kernel * 1e6:.1f} of it in the kernel"


async def _plain(style: str, config: FrontConfig) -> tuple[float, float]:
    """CPU seconds per token and stream of a plain server, and the kernel's share."""
    numbers = map(str, (config.streams, config.max_tokens, config.step_ms / 1e3))
    command = [sys.executable, "-m", "tools.bench.plain", style, *numbers]
    done = await trio.run_process(command, capture_stdout=True)
    cpu, kernel = json.loads(done.stdout)
    return cpu, kernel


def report(console: Console, num_streams: int, bare: Times, served: Times) -> None:
    alone, among_clients = bare.step_seconds * 1e3, served.step_seconds * 1e3
    ratio = among_clients / alone
    console.print(f"streams           {num_streams}, {served.num_steps} steady steps")
    console.print(f"step alone        {alone:.2f} ms")
    console.print(f"step when served  {among_clients:.2f} ms, {ratio:.3f} times as long")
