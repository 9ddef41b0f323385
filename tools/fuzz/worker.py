"""Fuzzes one target under atheris, which never returns.

python -m tools.fuzz.worker TARGET CORPUS [libFuzzer's flags]
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris


def main(name: str, corpus: Path, flags: list[str]) -> None:
    with atheris.instrument_imports(include=["kttrio", "h11", "h2", "hypercorn"]):
        from tools.fuzz.targets import TARGETS
    target, seeds = TARGETS[name]
    for number, seed in enumerate(seeds()):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], str(corpus), *flags], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
