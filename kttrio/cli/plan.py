"""`kttrio plan`: what a model would need and get on a machine, shown without loading anything.

It takes the flags of `kttrio serve`; --model may also name a bare config.json. What is decided is
in kttrio/runner/planning.py.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from kttrio.cli.flags import parse_flags
from kttrio.cli.foreign import FOREIGN, foreign_notes
from kttrio.config import (
    ConfigError,
    DeviceConfig,
    EngineConfig,
    ExpertConfig,
    ModelConfig,
    PlacementConfig,
    RecordingConfig,
    RunnerConfig,
    ServerConfig,
    flag,
)
from kttrio.serve import DEMO_MODEL

DESCRIPTION = "Show what `kttrio serve` with the same flags would need, without loading anything."
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {f"{unit}i": 2 ** (10 * power) for power, unit in enumerate("kmgt", 1)}

RECORDS = (
    ModelConfig,
    ExpertConfig,
    EngineConfig,
    DeviceConfig,
    PlacementConfig,
    RecordingConfig,
)
"""In the order of `RunnerConfig`."""

Size = Callable[[int], str]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """For which machine, and how it is shown."""

    memory: str | None = flag(
        None, "plan for so much available memory, as in 256GiB; default: what is available here"
    )
    gpu_memory: str | None = flag(
        None, "plan for a GPU of so much memory, as in 24GiB, whether there is one here or not"
    )
    json: bool = flag(False, "numbers for programs, in bytes, instead of tables")


def run(argv: Sequence[str]) -> int:
    """0 when the model would start, 1 when it does not fit."""
    shown, model, *others, foreign, _ = parse_flags(
        "kttrio plan", DESCRIPTION, argv, [PlanConfig, *RECORDS, FOREIGN, ServerConfig]
    )
    config = RunnerConfig(replace(model, model=model.model or DEMO_MODEL), *others)
    memory, gpu_memory = (
        None if text is None else parse_bytes(name, text)
        for name, text in (("--memory", shown.memory), ("--gpu-memory", shown.gpu_memory))
    )
    logging.basicConfig(format="%(levelname)s: %(message)s")
    for note in foreign_notes(foreign):
        log.warning("%s", note)
    # Here and not above: they import torch, seconds that a mistyped flag should not take.
    from kttrio.runner.device import imagined_machine
    from kttrio.runner.needs import format_bytes
    from kttrio.runner.planning import plan_start
    from kttrio.runner.preview import report
    from kttrio.weights.checkpoint import CheckpointError

    machine = imagined_machine(config.device.device, host_bytes=memory, device_bytes=gpu_memory)
    try:
        found = report(plan_start(config, machine))
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    if shown.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, Console(highlight=False, soft_wrap=True), format_bytes)
    return 1 if found["refusal"] else 0


def parse_bytes(flag: str, text: str) -> int:
    """'256GiB', '1.5 TB', '64g' -> bytes; ConfigError, naming the flag, for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", text.strip().lower())
    if not found:
        raise ConfigError(f"{flag}: {text!r} is no size; write it like 256GiB or 256GB")
    return int(float(found[1]) * UNITS[found[2]])


def show(report: dict[str, Any], console: Console, size: Size) -> None:
    """Tables of the weights by kind and of the memory, then the rest, then the verdict."""
    weights = _table("weights", "number", "size")
    for row in report["weights"]:
        weights.add_row(row["kind"], f"{row['number']:,}", size(row["bytes"]))
    total = sum(row["bytes"] for row in report["weights"])
    weights.add_row("all", f"{report['parameters']:,}", size(total), style="bold")
    memory = _table("memory", "where", "size")
    for row in report["memory"]:
        memory.add_row(row["name"], row["where"], size(row["bytes"]))
    for row in report["memories"]:
        memory.add_row("all", row["where"], size(row["bytes"]), style="bold")
    for table in (weights, memory):
        console.print(table, Text())
    for name, value in _facts(report, size).items():
        console.print(f"{name:<12}{value}", markup=False)


def _table(first: str, *others: str) -> Table:
    columns = (Column(name, justify="right", min_width=12) for name in others)
    return Table(first, *columns, box=None, pad_edge=False)


def _facts(report: dict[str, Any], size: Size) -> dict[str, str]:
    shape, experts = report["shape"], report["experts"]
    each = size(experts["bytes_each"])
    return {
        "layers": f"{shape['num_layers']}, {shape['num_experts']} experts, {shape['top_k']} used",
        "precision": f"{report['precision']}, experts {experts['format']}, {each} each",
        "activations": f"{experts['activation']} in the experts",
        "a token": f"{report['bytes_per_token']} bytes of KV cache",
        "a sequence": f"{size(report['bytes_per_sequence'])} of recurrent state",
        **({} if report["refusal"] else _room(report)),
        "available": "; ".join(_available(row, size) for row in report["memories"]),
        "verdict": report["refusal"] or _fit(report),
    }


def _available(memory: dict[str, Any], size: Size) -> str:
    available, budget = size(memory["available_bytes"]), size(memory["budget_bytes"])
    return f"{available} ({memory['where']}), of which {budget} may be filled"


def _room(report: dict[str, Any]) -> dict[str, str]:
    """What requests will find."""
    return {
        "KV cache": f"{report['num_tokens']} tokens",
        "sequences": f"{report['num_sequences']} at a time, each up to {report['context_length']} "
        "tokens",
        "steps": f"up to {report['num_step_tokens']} tokens",
        **(_divided(report) if report["device"] != "none" else {}),
    }


def _divided(report: dict[str, Any]) -> dict[str, str]:
    """How experts and prompts use the device."""
    experts = report["experts"]
    share = experts["on_device"] / experts["number"]
    found = {"on device": f"{experts['on_device']} of {experts['number']} experts ({share:.0%})"}
    if experts["ring"]:
        found["ring"] = f"{experts['ring']} experts on their way at a time"
    if report["long_tokens"]:
        found["prompts"] = (
            f"from {report['long_tokens']} tokens on layer by layer, {report['max_long_tokens']} "
            "at a time"
        )
    return found


def _fit(report: dict[str, Any]) -> str:
    context, made_for = report["context_length"], report["shape"]["context_length"]
    short = f", for sequences of at most {context} of the model's {made_for} tokens"
    return f"it fits{short if context < made_for else ''}"
