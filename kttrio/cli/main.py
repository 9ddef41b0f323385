"""`kttrio SUBCOMMAND ...`: finds the subcommand's module and turns bad usage into exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from kttrio.cli.flags import nearest
from kttrio.config import ConfigError

SUBCOMMANDS = {
    "serve": "load a model and answer over HTTP",
    "plan": "show what serving a model would need, without loading it",
    "chat": "talk to a running server from the terminal",
    "quant": "quantise a checkpoint's experts",
    "experts": "show recorded activations of experts, and what a GPU would take over",
    "version": "show the versions of kttrio and of what it stands on",
}

INTERRUPTED = 130
"""The exit code of what Ctrl-C has ended."""


def main() -> None:
    """The entry point `kttrio`; exits with the subcommand's code."""
    code = run(sys.argv[1:])
    if code == INTERRUPTED:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """Without the interpreter's own end: a thread that still loads would be thrown out of torch's
    code there, which aborts the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(argv: Sequence[str]) -> int:
    """Exit code of the command line: 0 done, 1 failed, 2 bad usage or setting."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    name = "version" if argv[0] == "--version" else argv[0]
    if name not in SUBCOMMANDS:
        print(f"kttrio: unknown subcommand {name!r}; {nearest(name, SUBCOMMANDS)}", file=sys.stderr)
        return 2
    try:
        code: int = import_module(f"kttrio.cli.{name}").run(argv[1:])
    except ConfigError as error:
        print(f"kttrio {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return code


def _usage() -> str:
    lines = [f"  {name:<9}{text}" for name, text in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: kttrio SUBCOMMAND [--flags]",
            "",
            *lines,
            "",
            "kttrio SUBCOMMAND --help: its flags",
        ]
    )
