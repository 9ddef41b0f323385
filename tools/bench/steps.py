"""Step times of a runner: alone, and with the whole server and its clients around it."""

from __future__ import annotations

import json
import resource
import sys
import time
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import trio

from kttrio.config import EngineConfig, RunnerConfig, ServerConfig
from kttrio.plan import Capacity, Chunk, StepPlan, StepResult, StepRunner
from kttrio.request import SamplingParams
from kttrio.serve import MemoryLine, Parts, Settings, serve
from kttrio.server.served_model import ServedModel

WARM_UP = 10
PROMPT_TOKENS = 16
TOP_P = 0.9  # as a chat has it: drawing is part of a step


class Step(NamedTuple):
    """One step as the compute thread saw it; seconds."""

    begin: float
    cpu: float
    """CPU time that the whole process had used when the step began,"""
    kernel: float
    """and the kernel's share of it."""
    num_sequences: int
    num_tokens: int


class Recorder:
    """A runner that notes when each step of another begins."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self.steps: list[Step] = []
        self.ends: list[float] = []
        """When each step's tokens were known; seconds of the system's monotonic clock."""

    @property
    def capacity(self) -> Capacity:
        return self._runner.capacity

    def step(self, plan: StepPlan) -> StepResult:
        begin, cpu = time.perf_counter(), time.process_time()
        kernel = resource.getrusage(resource.RUSAGE_SELF).ru_stime
        self.steps.append(Step(begin, cpu, kernel, len(plan.chunks), plan.num_tokens))
        result = self._runner.step(plan)
        self.ends.append(time.monotonic())
        return result

    def close(self) -> None:
        self._runner.close()


@dataclass(frozen=True, slots=True)
class Times:
    """What steady decode steps cost, per step and per token."""

    num_steps: int
    step_seconds: float
    """Median from the beginning of one step to that of the next."""
    cpu_seconds_per_token: float
    """CPU time of the whole process, over all tokens of all streams,"""
    kernel_seconds_per_token: float
    """and the kernel's share of it."""


def steady(steps: Sequence[Step], num_streams: int) -> Times:
    """The times of the steps in which every stream drew one token."""
    full = [
        (step, after)
        for step, after in pairwise(steps)
        if step.num_sequences == step.num_tokens == after.num_tokens == num_streams
    ][WARM_UP:]
    if not full:
        raise RuntimeError(f"no step had all {num_streams} streams; ask for more tokens")
    num_tokens = len(full) * num_streams
    return Times(
        num_steps=len(full),
        step_seconds=median(after.begin - step.begin for step, after in full),
        cpu_seconds_per_token=sum(after.cpu - step.cpu for step, after in full) / num_tokens,
        kernel_seconds_per_token=(
            sum(after.kernel - step.kernel for step, after in full) / num_tokens
        ),
    )


def run_bare(runner: StepRunner, num_streams: int, num_steps: int) -> Times:
    """Decode steps of `num_streams` sequences, one after the other, nothing else running."""
    recorder = Recorder(runner)
    page_size = runner.capacity.page_size
    num_pages = -(-(PROMPT_TOKENS + num_steps) // page_size)
    sampling = SamplingParams(max_tokens=num_steps, seed=0, top_p=TOP_P)
    tokens: list[tuple[int, ...]] = [tuple(range(PROMPT_TOKENS))] * num_streams
    start = 0
    for _ in range(num_steps):
        end = start + len(tokens[0])
        chunks = tuple(
            Chunk(
                slot=slot,
                start=start,
                token_ids=tokens[slot],
                pages=tuple(range(slot * num_pages, slot * num_pages - (-end // page_size))),
                sampling=replace(sampling, seed=slot),
                sample=True,
                num_prompt_tokens=PROMPT_TOKENS,
            )
            for slot in range(num_streams)
        )
        result = recorder.step(StepPlan(chunks))
        tokens = [chunk.tokens or (0,) for chunk in result.chunks]
        start = end
    return steady(recorder.steps, num_streams)


class QuietFace:
    """Nobody looks; whoever waits learns the URL."""

    def __init__(self) -> None:
        self.url = ""
        self.listens = trio.Event()

    def planned(self, memory: Sequence[MemoryLine]) -> None: ...

    def loading(self, done: int, total: int) -> None: ...

    def ready(self, url: str, model: str, facts: Mapping[str, object]) -> None:
        self.url = url
        self.listens.set()

    def draining(self, num_requests: int) -> None: ...


class Reading(NamedTuple):
    """What the readers of all streams saw."""

    failed: int
    """Streams that did not end as they should."""
    arrivals: Sequence[float]
    """When something came, to whomever; seconds of the system's monotonic clock."""

    def delays(self, recorder: Recorder) -> list[float]:
        """From the end of a step to each arrival of what it found, in seconds, sorted."""
        ends = recorder.ends
        return sorted(
            at - ends[bisect(ends, at) - 1] for at in self.arrivals if ends[WARM_UP] <= at
        )


async def run_served(
    recorder: Recorder, model: ServedModel, num_streams: int, num_tokens: int
) -> Reading:
    """Serve `recorder` in this process to readers in another."""
    face, settings = QuietFace(), served_settings(num_streams)

    def build(_settings: Settings, _face: object) -> Parts:
        return Parts(recorder, model, {})

    async with trio.open_nursery() as nursery:

        async def run() -> None:
            await serve(settings, face, build=build)

        nursery.start_soon(run)
        await face.listens.wait()
        reading = await _read_streams(face.url, num_streams, num_tokens)
        nursery.cancel_scope.cancel()
    return reading


def served_settings(num_streams: int) -> Settings:
    return Settings(
        RunnerConfig(engine=EngineConfig(max_running_requests=num_streams)),
        server=ServerConfig(port=0, log_level="warning"),
    )


async def _read_streams(url: str, num_streams: int, num_tokens: int) -> Reading:
    arguments = [url, *map(str, (num_streams, num_tokens, PROMPT_TOKENS, TOP_P))]
    command = [sys.executable, "-m", "tools.bench.readers", *arguments]
    done = await trio.run_process(command, capture_stdout=True)
    return Reading(**json.loads(done.stdout))
