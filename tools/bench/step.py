"""`python -m tools.bench step`: a model's decode step alone, and under the server with clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import trio
from rich.console import Console

from kttrio.cli.flags import parse_flags
from kttrio.config import ModelConfig, flag
from kttrio.serve import build_parts
from tools.bench.front import report
from tools.bench.steps import QuietFace, Recorder, run_bare, run_served, served_settings, steady


@dataclass(frozen=True, slots=True)
class StepConfig:
    """Which model, and how many streams."""

    model: Path | None = flag(None, "checkpoint directory; the embedded demo model when absent")
    streams: int = flag(64, "streams at the same time", least=1)
    max_tokens: int = flag(100, "tokens of every stream", least=20)


def run(argv: Sequence[str]) -> int:
    description = "Measure a model's step, alone and served."
    (config,) = parse_flags("python -m tools.bench step", description, argv, [StepConfig])
    return trio.run(_run, config, Console(highlight=False))


async def _run(config: StepConfig, console: Console) -> int:
    settings = served_settings(config.streams)
    runner = replace(settings.runner, model=ModelConfig(model=config.model))
    settings = replace(settings, runner=runner)
    parts = await trio.to_thread.run_sync(build_parts, settings, QuietFace())
    bare = await trio.to_thread.run_sync(run_bare, parts.runner, config.streams, config.max_tokens)
    recorder = Recorder(parts.runner)
    reading = await run_served(recorder, parts.model, config.streams, config.max_tokens)
    report(console, config.streams, bare, steady(recorder.steps, config.streams))
    return 1 if reading.failed else 0
