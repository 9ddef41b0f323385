"""`python -m tools.fuzz parsers`: atheris feeds everything that reads what comes from outside, and
learns from which lines of it run what to try next."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from kttrio.cli.flags import parse_flags
from kttrio.config import flag
from tools.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
EXECUTED = re.compile(r"stat::number_of_executed_units: (\d+)")
COVERED = re.compile(r"cov: (\d+)")
SLOWEST_SECONDS = 20
MOST_MIB = 2048
SHOWN = 3000
ALL = tuple(name for name in TARGETS if name != "any")


@dataclass(frozen=True, slots=True)
class ParsersConfig:
    """How long, and which."""

    seconds: int = flag(10, "for each target", least=1)
    only: tuple[str, ...] = flag((), f"targets, of {', '.join(TARGETS)}; default: all but any")
    seed: int = flag(1, "of what is tried; 0: another each time", least=0)
    corpus: Path | None = flag(
        None, "directory that keeps, for each target, what found new lines, for the next time"
    )


def run(argv: Sequence[str]) -> int:
    description = "Feed every parser what nobody would send."
    (config,) = parse_flags("python -m tools.fuzz parsers", description, argv, [ParsersConfig])
    if find_spec("atheris") is None:
        print("tools.fuzz parsers: atheris is not installed: pip install '.[test]'")
        return 2
    failed = [name for name in config.only or ALL if not _fuzz(name, config)]
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return int(bool(failed))


def _fuzz(name: str, config: ParsersConfig) -> bool:
    """Whether the target took all that was tried."""
    with TemporaryDirectory() as folder:
        corpus = Path(config.corpus or folder, name)
        corpus.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "tools.fuzz.worker", name, str(corpus)),
            *(f"-max_total_time={config.seconds}", f"-seed={config.seed}", "-print_final_stats=1"),
            *(f"-timeout={SLOWEST_SECONDS}", f"-rss_limit_mb={MOST_MIB}", "-max_len=4096"),
            f"-artifact_prefix={folder}/",
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    tried, lines = EXECUTED.search(done.stdout), COVERED.findall(done.stdout)
    counts = f"{tried[1] if tried else '?':>9} tried, {lines[-1] if lines else '?':>5} branches"
    print(f"{name:<10} {counts}  {'ok' if not done.returncode else 'FAILED'}", flush=True)
    if done.returncode:
        print(done.stdout[-SHOWN:])
    return not done.returncode
