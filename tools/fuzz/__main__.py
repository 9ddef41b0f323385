"""`python -m tools.fuzz api|parsers`: what nobody would send, to see what becomes of it."""

from __future__ import annotations

import sys
from importlib import import_module

from kttrio.cli.flags import nearest

FUZZERS = {
    "api": "the whole API of a running server, as its own document tells it",
    "parsers": "whatever reads bytes or text that come from outside",
}


def main(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {fuzzer:<9}{text}" for fuzzer, text in FUZZERS.items()]
        print("\n".join(["usage: python -m tools.fuzz FUZZER [--flags]", "", *lines]))
        return 0 if argv else 2
    if name not in FUZZERS:
        print(f"no fuzzer {name!r}; {nearest(name, FUZZERS)}", file=sys.stderr)
        return 2
    code: int = import_module(f"tools.fuzz.{name}").run(argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
