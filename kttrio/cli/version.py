"""`kttrio version`: what is installed, for bug reports."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

from kttrio import native
from kttrio.cli.flags import parse_flags

PACKAGES = ("kttrio", "torch", "trio", "hypercorn", "quart", "quart-trio", "tokenizers")


def run(argv: Sequence[str]) -> int:
    parse_flags("kttrio version", "Show what is installed.", argv, ())
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows():
        table.add_row(name, value)
    Console(soft_wrap=True).print(table)
    return 0


def _rows() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "python", f"{platform.python_version()} ({platform.machine()})"
    try:
        kernels = ", ".join(native.isa_available())
        yield "library", f"ABI {native.ABI_VERSION}, kernels for {kernels} on this machine"
    except native.NativeError as error:
        yield "library", f"not usable: {error}"
