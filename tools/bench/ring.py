"""`python -m tools.bench ring`: how fast experts of the host come to the device, beside a plain
copy of as many bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
from tools.bench.layers import NUM_DISTINCT, SHAPES, Expert, RotatingLayers, Shape
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
    target = Target(form, find(form).GROUPS[0])
    published = SHAPES[name]
    shape = SlotShape(published.hidden_size, published.intermediate_size, target)
    most = max(int(config.gib * 2**30 / shape.nbytes), 1)
    layer_shape = Shape(min(published.num_experts, most), 1, *shape_sizes(shape))
    experts = [Expert(layer_shape, *target) for _ in range(NUM_DISTINCT)]
    with Pool(threads=config.threads) as pool:
        layers = RotatingLayers(
            pool, layer_shape, experts, activation="float32", max_tokens=1, least_bytes=1
        )
        feeders = Feeders(
            ExpertSlots(shape, config.slots, device=device.where),
            range(config.slots),
            device,
            pool_threads=pool.num_threads,
        )
        ring = Ring(feeders, num_experts=layer_shape.num_experts)
        try:
            return measure_passage(
                ring,
                layers.layers[0],
                range(layer_shape.num_experts),
                name=f"{name} {form}",
                seconds=config.seconds,
            )
        finally:
            ring.close()
            layers.close()


def shape_sizes(shape: SlotShape) -> tuple[int, int]:
    return shape.hidden_size, shape.intermediate_size


def measure_passage(
    ring: Ring, layer: ExpertLayer, experts: Sequence[int], *, name: str, seconds: float
) -> Passage:
    """Let the layer's experts pass through the ring, of a loaded model or of a layer alone."""
    device, shape = ring.device, ring.slots.shape
    size = min(ring.batch, len(ring.room))
    staging = shape.outline().map(
        lambda tensor: device.pinned(size, *tensor.shape, dtype=tensor.dtype)
    )
    first = staging.map(lambda stack: stack[0])
    stream = device.open_stream("bench")

    def unpack() -> None:
        for expert in experts:
            first.unpack_from(layer, expert)

    def copy() -> None:
        for number in range(-(-len(experts) // size)):
            at = ring.room[number * size % (len(ring.room) - size + 1)]
            slots = ring.slots.stacks.map(lambda stack, at=at: stack[at : at + size])
            stream.run(partial(slots.copy_, staging))
        device.synchronize()

    def send() -> None:
        x = torch.empty(0, shape.hidden_size, device=device.where)
        for _ in ring.stream(layer, experts, x=x, parts=()):
            pass
        device.synchronize()

    num_bytes = len(experts) * shape.nbytes
    copied_bytes = -(-len(experts) // size) * size * shape.nbytes
    unpacked = num_bytes / fastest(unpack, seconds)
    copied = copied_bytes / fastest(copy, seconds)
    streamed = num_bytes / fastest(send, seconds)
    ring.forget()
    return Passage(name, shape.nbytes, unpacked, copied, streamed)


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
