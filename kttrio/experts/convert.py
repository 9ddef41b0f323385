"""Quantises all routed experts of a checkpoint into a directory: what `kttrio quant` does.

Needs memory for a few matrices of each thread, not for a layer, and no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kttrio.config import ConfigError
from kttrio.experts.formats import INTEGERS, SOURCES, check_experts
from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.conversion import (
    BusyError,
    Conversion,
    Identity,
    NoRoomError,
    find_stranger,
    is_empty,
)
from kttrio.weights.fingerprint import fingerprint
from kttrio.weights.formats import base as formats
from kttrio.weights.loader import Countdown, ExpertWeights, Progress, stored_bytes
from kttrio.weights.quantize import Deviation, Quantised, Target, quantise_all

_KERNEL_COLUMNS = 32  # sizes that the expert kernels take are multiples of it


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be quantised, into what, and where to."""

    source: Path
    output: Path
    target: Target
    maps: Sequence[ExpertWeights]
    threads: int
    resume: bool

    def name(self, layer: int) -> str:
        """The common part of the names of a layer's experts."""
        return self.maps[layer].gate.partition("{}")[0].rstrip(".")


LayerDone = Callable[[int, Deviation], None]
"""Called with a layer's place among the job's and its error, also for those done before."""


def choose_target(method: str, group: int | None) -> Target:
    """ConfigError where the group does not fit the method."""
    if group is not None and method not in INTEGERS:
        raise ConfigError(
            f"--group-size {group}: {method} has scales of its own, for squares of 128 x 128; "
            "leave the flag away"
        )
    usual, *_ = formats.find(method).GROUPS
    return Target(method, group or usual)


def convert(job: Job, *, progress: Progress, layer_done: LayerDone) -> int:
    """Run the job, or what is left of it; returns the bytes that the output holds.

    `progress` hears of bytes of the source. Raises ConfigError and CheckpointError before anything
    is written; an OSError, or a kill, leaves what can be resumed.
    """
    _check_output(job)
    with Checkpoint(job.source) as checkpoint:
        _check_source(checkpoint, job)
        names = (part.name for weights in job.maps for part in weights.all_parts())
        identity = Identity(fingerprint(checkpoint, names), job.target)
        with _open(job, identity) as conversion:
            _fill(conversion, checkpoint, job, progress, layer_done)
            return sum(conversion.layer_bytes(layer) for layer in range(len(job.maps)))


def _fill(
    conversion: Conversion,
    checkpoint: Checkpoint,
    job: Job,
    progress: Progress,
    layer_done: LayerDone,
) -> None:
    for layer, deviation in conversion.deviations.items():
        layer_done(layer, deviation)
    missing = conversion.missing
    total = sum(stored_bytes(checkpoint, job.maps[layer].all_parts()) for layer in missing)
    countdown = Countdown(total, progress)
    for layer in missing:
        parts = job.maps[layer].all_parts()
        matrices = quantise_all(checkpoint, parts, job.target, threads=job.threads)
        conversion.write(layer, _counted(matrices, checkpoint, countdown))
        checkpoint.release()
        layer_done(layer, conversion.deviations[layer])
    conversion.finish()


def _counted(
    matrices: Iterable[Quantised], checkpoint: Checkpoint, countdown: Countdown
) -> Iterator[Quantised]:
    for matrix in matrices:
        yield matrix
        countdown.add(stored_bytes(checkpoint, [matrix.part]))


def _open(job: Job, identity: Identity) -> Conversion:
    try:
        conversion = Conversion(job.output, identity, job.maps)
    except BusyError as error:
        raise ConfigError(f"--output {job.output}: {error}; wait for it, or end it") from error
    try:
        conversion.check_room()
    except NoRoomError as error:
        conversion.__exit__()
        raise ConfigError(f"--output: {error}; make room or name another disk") from error
    return conversion


def _check_output(job: Job) -> None:
    if job.output.exists() and not job.output.is_dir():
        raise ConfigError(f"--output {job.output} is no directory; name another")
    if not job.output.is_dir():
        return
    stranger = find_stranger(job.output)
    if job.resume and stranger is not None:
        raise ConfigError(
            f"--output {job.output} holds {stranger.name}, which kttrio quant does not write: "
            "--resume goes on in a directory of its own; name another, or move that away"
        )
    if not job.resume and not is_empty(job.output):
        raise ConfigError(
            f"--output {job.output} is not empty; go on with a conversion that was ended there "
            "with --resume, or name another directory"
        )


def _check_source(checkpoint: Checkpoint, job: Job) -> None:
    found = {check_experts(checkpoint, weights)[0] for weights in job.maps}
    integers = sorted(found.difference(SOURCES))
    if integers:
        raise ConfigError(
            f"--input {job.source}: the experts are {'+'.join(integers)} already; name the bf16 or "
            "fp8 checkpoint that they were made from"
        )
    if found == {job.target.form}:
        raise ConfigError(
            f"--input {job.source}: the experts are {job.target.form} already; it can be served as "
            "it is"
        )
    for weights in job.maps:
        for size in (weights.hidden_size, weights.intermediate_size):
            if size % _KERNEL_COLUMNS:
                raise CheckpointError(
                    f"experts of {weights.hidden_size} x {weights.intermediate_size} cannot be "
                    f"served: the kernels take multiples of {_KERNEL_COLUMNS}"
                )
