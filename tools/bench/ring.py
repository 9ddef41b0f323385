"""`python -m tools.bench ring`: how fast experts of the host come to the device, beside a plain
copy of as many bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from kttrio.cli.flags import parse_flags
from kttrio.config import ConfigError, flag
from kttrio.device.base import Device
from kttrio.experts.feeders import Feeders
from kttrio.experts.slots import ExpertSlots, SlotShape
from kttrio.experts.streamed import Ring
from kttrio.native import ExpertLayer, Pool
from kttrio.runner.device import find_machine, open_device
from kttrio.weights.formats.base import find
from kttrio.weights.quantize import Target
from tools.bench.layers import NUM_DISTINCT, SHAPES, Expert, RotatingLayers
from tools.bench.record import check_place, write_record

FORMATS = ("bf16", "fp8", "int8", "int4")


@dataclass(frozen=True, slots=True)
class RingConfig:
    """What is measured."""

    shapes: tuple[str, ...] = flag(tuple(SHAPES), "MoE layers of models", choices=tuple(SHAPES))
    formats: tuple[str, ...] = flag(FORMATS, "how the weights are stored", choices=FORMATS)
    device: str = flag("auto", "where they come to", choices=("auto", "cuda", "cpu"))
    slots: int = flag(64, "of the ring", least=2)
    threads: int | None = flag(None, "workers; default: the cores this process may use", least=1)
    gib: float = flag(1.0, "most GiB of experts that pass", least=0)
    seconds: float = flag(1.0, "of runs for every number", least=0)
    json: Path | None = flag(None, "write the numbers to this file")


@dataclass(frozen=True, slots=True)
class Passage:
    """Bytes per second, of the fastest runs: others only subtract."""

    name: str
    expert_bytes: int
    unpacked: float
    """Into pinned memory, by one thread."""
    copied: float
    """From pinned memory, that was written before, into slots."""
    streamed: float
    """Both, as a long prompt has it: without anything computed."""

    @property
    def share(self) -> float:
        """Of what copies alone could do."""
        return self.streamed / self.copied


def run(argv: Sequence[str]) -> int:
    description = "Measure the ring of experts."
    (config,) = parse_flags("python -m tools.bench ring", description, argv, [RingConfig])
    check_place(config.json)
    device = open_device(find_machine(config.device).kind)
    if device is None:
        raise ConfigError("--device: there is no GPU; let the CPU stand in for one with cpu")
    passages = [
        measure_shape(config, device, name, form)
        for name in config.shapes
        for form in config.formats
    ]
    report(passages, Console(highlight=False))
    record = [{**asdict(passage), "share": passage.share} for passage in passages]
    write_record(config.json, {"flags": {**asdict(config), "json": None}, "passages": record})
    return 0


def measure_shape(config: RingConfig, device: Device, name: str, form: str) -> Passage:
    target, published = Target(form, find(form).GROUPS[0]), SHAPES[name]
    shape = SlotShape(published.hidden_size, published.intermediate_size, target)
    most = max(int(config.gib * 2**30 / shape.nbytes), 1)
    few = replace(published, num_experts=min(published.num_experts, most), top_k=1)
    experts = [Expert(few, *target) for _ in range(NUM_DISTINCT)]
    with ExitStack() as held:
        pool = held.enter_context(Pool(threads=config.threads))
        layers = RotatingLayers(
            pool, few, experts, activation="float32", max_tokens=1, least_bytes=1
        )
        held.enter_context(closing(layers))
        slots = ExpertSlots(shape, config.slots, device=device.where)
        room = range(config.slots)
        feeders = Feeders(slots, room, device, pool_threads=pool.num_threads)
        ring = held.enter_context(closing(Ring(feeders, num_experts=few.num_experts)))
        passing = Passing(ring, layers.layers[0], range(few.num_experts))
        return passing.measure(f"{name} {form}", config.seconds)


class Passing:
    """Experts of a layer that pass through a ring: of a loaded model, or of a layer alone."""

    def __init__(self, ring: Ring, layer: ExpertLayer, experts: Sequence[int]) -> None:
        self.ring, self.layer, self.experts = ring, layer, experts
        self.device, self.shape = ring.device, ring.slots.shape
        self.stream = self.device.open_stream("bench")
        self.staging = self.shape.outline().map(self._pinned)
        self.loads = [
            ring.slots.stacks.map(itemgetter(slice(at, at + ring.batch)))
            for at in range(ring.room.start, ring.room.stop - ring.batch + 1, ring.batch)
        ]
        """Slots that are filled at once."""

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.device.pinned(self.ring.batch, *tensor.shape, dtype=tensor.dtype)

    def measure(self, name: str, seconds: float) -> Passage:
        nbytes = self.shape.nbytes
        num_copied = len(self.loads) * self.ring.batch
        passage = Passage(
            name,
            nbytes,
            unpacked=len(self.experts) * nbytes / fastest(self.unpack, seconds),
            copied=num_copied * nbytes / fastest(self.copy, seconds),
            streamed=len(self.experts) * nbytes / fastest(self.send, seconds),
        )
        self.ring.forget()
        return passage

    def unpack(self) -> None:
        room = self.staging.map(itemgetter(0))
        for expert in self.experts:
            room.unpack_from(self.layer, expert)

    def copy(self) -> None:
        for slots in self.loads:
            self.stream.run(partial(slots.copy_, self.staging))
        self.device.synchronize()

    def send(self) -> None:
        x = torch.empty(0, self.shape.hidden_size, device=self.device.where)
        for _ in self.ring.stream(self.layer, self.experts, x=x, parts=()):
            pass
        self.device.synchronize()


def fastest(work: Callable[[], None], seconds: float) -> float:
    """Seconds of the fastest run, after one that does not count."""
    work()
    runs: list[float] = []
    while not runs or sum(runs) < seconds:
        begin = time.perf_counter()
        work()
        runs.append(time.perf_counter() - begin)
    return min(runs)


def report(passages: Sequence[Passage], console: Console) -> None:
    table = Table(title="experts on their way to the device", box=box.SIMPLE_HEAD)
    table.add_column("experts")
    for name in ("MB each", "unpack GB/s", "copy GB/s", "ring GB/s", "of the copy"):
        table.add_column(name, justify="right")
    for one in passages:
        rates = (f"{rate / 1e9:.1f}" for rate in (one.unpacked, one.copied, one.streamed))
        table.add_row(one.name, f"{one.expert_bytes / 1e6:.1f}", *rates, f"{one.share:.0%}")
    console.print(table)
