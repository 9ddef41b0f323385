"""Fills a module from a checkpoint through the model's declared weight map.

Everything is checked against the headers first: a wrong checkpoint fails in the first second,
with the tensor and the file in the message. Routed experts are only checked here; the expert
bank reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.formats import base as formats
from kttrio.weights.formats import fp8

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""


class Part(NamedTuple):
    """One stored tensor and the shape the config demands."""

    name: str
    shape: tuple[int, ...]


def stack_rows(*parts: Tensor) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, slots=True)
class Weight:
    """How one parameter of the module comes to be: stored parts, put together by `arrange`."""

    target: str
    parts: tuple[Part, ...]
    arrange: Callable[..., Tensor] = stack_rows


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The routed experts of one layer; `{}` in a name stands for the expert's number."""

    gate: str  # [intermediate, hidden]
    up: str  # [intermediate, hidden]
    down: str  # [hidden, intermediate]
    num_experts: int
    hidden_size: int
    intermediate_size: int

    def parts(self, expert: int) -> tuple[Part, Part, Part]:
        wide = (self.intermediate_size, self.hidden_size)
        return (
            Part(self.gate.format(expert), wide),
            Part(self.up.format(expert), wide),
            Part(self.down.format(expert), wide[::-1]),
        )

    def all_parts(self) -> Iterator[Part]:
        for expert in range(self.num_experts):
            yield from self.parts(expert)


class Countdown:
    """Adds up the bytes that were read and tells `progress`."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def check_parts(checkpoint: Checkpoint, parts: Iterable[Part]) -> None:
    """Raise CheckpointError for the first part that is missing, misshapen or unreadable."""
    for part in parts:
        entry = checkpoint.entry(part.name)
        form = formats.find(formats.stored_format(checkpoint, part.name))
        wanted = form.stored_shape(part.shape)
        if entry.shape != wanted:
            raise CheckpointError(
                f"tensor {part.name!r} in {entry.file} has shape {list(entry.shape)}; the config "
                f"asks for {list(wanted)}"
            )
        form.check(checkpoint, part.name)


def check_names(checkpoint: Checkpoint, known: set[str], skipped: tuple[str, ...]) -> None:
    """Raise CheckpointError for a tensor that nobody asked for.

    `skipped` are prefixes of what the model leaves out knowingly.
    """
    suffixes = ("", *formats.companions())
    for name, entry in checkpoint.entries.items():
        bases = (name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix))
        if not name.startswith(skipped) and known.isdisjoint(bases):
            raise CheckpointError(
                f"tensor {name!r} in {entry.file} is unexpected: this model has no such weight"
            )


def stored_bytes(checkpoint: Checkpoint, parts: Iterable[Part]) -> int:
    """Bytes of the parts and their scales."""
    total = 0
    for part in parts:
        companion = formats.find(formats.stored_format(checkpoint, part.name)).COMPANION
        names = {part.name, part.name + companion}
        total += sum(checkpoint.entry(name).nbytes for name in names)
    return total


def fill(
    module: nn.Module, checkpoint: Checkpoint, weights: Iterable[Weight], countdown: Countdown
) -> None:
    """Load every parameter; quantised matrices are dequantised to the parameter's dtype, but those
    of FP8 parameters are taken as they are, with the scales."""
    parameters = dict(module.named_parameters())
    for weight in weights:
        parameter = parameters.pop(weight.target)
        if parameter.dtype is torch.float8_e4m3fn:
            _take(checkpoint, weight, (parameter, parameters.pop(scale_target(weight.target))))
        else:
            parts = [_read(checkpoint, part.name, parameter.dtype) for part in weight.parts]
            parameter.copy_(weight.arrange(*parts).reshape(parameter.shape))
        countdown.add(stored_bytes(checkpoint, weight.parts))
    if parameters:
        raise ValueError(f"the weight map leaves out {', '.join(parameters)}")


def stacks_blocks(weight: Weight) -> bool:
    """Whether parts in FP8 stay so when they are stacked: whole blocks of rows, the last part's
    excepted."""
    rows = [part.shape[0] for part in weight.parts]
    return weight.arrange is stack_rows and not any(size % fp8.BLOCK for size in rows[:-1])


def scale_target(target: str) -> str:
    """Where the scales of an FP8 parameter go."""
    return f"{target.removesuffix('weight')}scale"


def _take(checkpoint: Checkpoint, weight: Weight, held: tuple[Tensor, Tensor]) -> None:
    """Data and scales of the stacked parts, as they are stored."""
    parts = [fp8.load(checkpoint, part.name) for part in weight.parts]
    for tensor, stored in zip(held, zip(*parts, strict=True), strict=True):
        tensor.copy_(torch.cat(stored))


def _read(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    form = formats.find(formats.stored_format(checkpoint, name))
    return form.dequantize(form.load(checkpoint, name), dtype)
