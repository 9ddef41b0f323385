"""The C++ programs that are built beside the library for the benches."""

from __future__ import annotations

from pathlib import Path

from kttrio.native import BUILD_COMMAND, NativeError


def find_program(name: str) -> str:
    """The newest one that was built in the source tree."""
    root = Path(__file__).resolve().parents[2]
    built = sorted(root.glob(f"build*/{name}"), key=lambda path: path.stat().st_mtime)
    if not built:
        raise NativeError(f"no build*/{name} in {root}; build it: {BUILD_COMMAND}")
    return str(built[-1])
