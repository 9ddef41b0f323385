"""`python -m tools.fuzz api`: schemathesis reads /openapi.json and asks whatever it allows, and
whatever it does not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

from kttrio.cli.flags import parse_flags
from kttrio.config import flag
from tools.demo_server import faults, running_server

RULES = Path(__file__).with_name("schemathesis.toml")
FLAGS = ("--context-length", "96", "--max-running-requests", "16", "--no-access-log")
"""Answers are short, whatever is asked for."""


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """How much is asked."""

    examples: int = flag(100, "cases drawn at random for each operation", least=1)
    coverage: bool = flag(True, "before them, each boundary of each field: ten thousand cases")
    seed: int = flag(0, "of the cases", least=0)


def run(argv: Sequence[str]) -> int:
    description = "Ask a server everything its own document speaks of."
    (config,) = parse_flags("python -m tools.fuzz api", description, argv, [ApiConfig])
    return trio.run(_run, config)


async def _run(config: ApiConfig) -> int:
    with TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        async with running_server(log, *FLAGS) as server:
            asked = command(server.url, config)
            done = await trio.run_process(asked, check=False, cwd=folder)
        told = faults(log)
    print(*told, sep="\n")
    return done.returncode or int(bool(told))


def command(url: str, config: ApiConfig) -> list[str]:
    """Runs schemathesis against the server at `url`."""
    program = Path(sys.executable).with_name("schemathesis")
    phases = "coverage,fuzzing" if config.coverage else "fuzzing"
    return [
        *(str(program), "--config-file", str(RULES), "run", f"{url}/openapi.json"),
        *("--phases", phases, "--max-examples", str(config.examples), "--seed", str(config.seed)),
        *("--continue-on-failure", "--no-shrink", "--generation-database", "none"),
        *("--request-timeout", "60", "--no-color"),
    ]
