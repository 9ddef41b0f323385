"""`python -m tools.bench experts|dsa|load|...`: what kernels and serving cost."""

from __future__ import annotations

import sys
from importlib import import_module

from kttrio.cli.flags import nearest
from kttrio.config import ConfigError

BENCHES = {
    "experts": "the expert kernels in every format, beside the limits of the machine",
    "dsa": "one layer of sparse attention over growing contexts, beside a dense one",
    "overhead": "what a forward of the expert library costs beside its experts",
    "load": "requests over HTTP at rising concurrency, also with clients that vanish",
    "front": "what the HTTP side and the engine cost, with a runner that only sleeps",
    "step": "one model's step alone and under the server",
    "hybrid": "a model divided between a device and the host: decode, prefill, hand-off",
    "drafts": "what a step with drafts costs, and how many must stand for it to pay",
    "ring": "how fast experts of the host come to the device, beside a plain copy",
    "soak": "minutes of mixed and hostile load, and what it leaves behind",
    "storm": "what streams feel while other clients misbehave",
    "masks": "what it costs to hold answers to a form",
    "coverage": "what experts on a device serve, by strategy and budget",
}


def main(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {bench:<9}{text}" for bench, text in BENCHES.items()]
        print("\n".join(["usage: python -m tools.bench BENCH [--flags]", "", *lines]))
        return 0 if argv else 2
    if name not in BENCHES:
        print(f"no bench {name!r}; {nearest(name, BENCHES)}", file=sys.stderr)
        return 2
    try:
        code: int = import_module(f"tools.bench.{name}").run(argv[1:])
    except ConfigError as error:
        print(f"tools.bench {name}: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
