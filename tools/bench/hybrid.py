"""`python -m tools.bench hybrid`: a model divided between a device and the host.

Decode and prefill in tokens a second, with and without captured steps, by share of the experts on
the device; what a layer pays for asking the host; how much of the link to the device streamed
prefill uses. Weights are random: tokens choose their experts evenly, which real ones do not. With a
GPU that is the device; else the CPU stands in for it, and the first row is what it does alone: a
share of 0 then shows what the division itself costs.
"""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from kttrio.cli.flags import parse_flags
from kttrio.config import (
    ConfigError,
    DeviceConfig,
    EngineConfig,
    ExpertConfig,
    ModelConfig,
    PlacementConfig,
    RunnerConfig,
    flag,
)
from kttrio.device.base import Device
from kttrio.engine.scheduler import Scheduler
from kttrio.request import GenerateRequest, SamplingParams
from kttrio.runner.build import load_runner
from kttrio.runner.device import Machine, find_machine, open_device
from kttrio.runner.planning import Start, plan_start
from kttrio.runner.runner import Runner
from kttrio.weights.checkpoint import read_json
from tools.bench.handoffs import HandoffCell, measure_handoff
from tools.bench.hybrid_cells import DecodeCell, Findings, PrefillCell, print_tables
from tools.bench.random_model import RandomLoader
from tools.bench.record import check_place, write_record
from tools.bench.steps import PROMPT_TOKENS, run_bare

# Qwen3-Coder-Next, its experts in FP8.
SHAPE: dict[str, Any] = {
    "model_type": "qwen3_next",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000,
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": False,
    "full_attention_interval": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "intermediate_size": 5120,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    },
}
LAYER_STEP = 4  # the fewest layers that have each kind
LINK_BYTES = 1 << 28
ANSWER_ROOM = 64  # tokens of a context beside the longest prompt


@dataclass(frozen=True, slots=True)
class HybridConfig:
    """What is measured."""

    config: Path | None = flag(None, "config.json of the model; default: Qwen3-Coder-Next in FP8")
    device: str = flag("auto", "auto: a GPU if there is one", choices=("auto", "cuda", "cpu"))
    layers: int | None = flag(None, "layers; default: as many as memory holds", least=1)
    experts: int | None = flag(None, "experts of a layer; default: the model's", least=1)
    shares: tuple[int, ...] = flag((0, 25, 50), "per cent of the experts on the device", most=100)
    sequences: tuple[int, ...] = flag((1, 4, 16), "sequences decoded together", least=1)
    prompts: tuple[int, ...] = flag((256, 2048, 16384), "tokens of prompts", least=1)
    steps: int = flag(60, "decode steps of each kind", least=20)
    chunk: int = flag(2048, "most tokens of a step", least=16)
    threads: int | None = flag(None, "of the host's experts; default: one for each core", least=1)
    json: Path | None = flag(None, "write the numbers to this file")


def run(argv: Sequence[str]) -> int:
    description = "Measure a model that is divided between a device and the host."
    (config,) = parse_flags("python -m tools.bench hybrid", description, argv, [HybridConfig])
    check_place(config.json)
    console = Console(highlight=False)
    findings = measure_hybrid(config, console)
    print_tables(findings, console)
    flags = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(config).items()
    }
    write_record(config.json, {"flags": flags | {"json": None}, **asdict(findings)})
    return 0


def measure_hybrid(config: HybridConfig, console: Console) -> Findings:
    findings, machine = Findings(), find_machine(config.device)
    standing_in = machine if machine.kind == "cuda" else replace(machine, kind="cpu")
    device = open_device(standing_in.kind)
    assert device is not None
    findings.handoff = measure_handoffs(device)
    findings.link_gigabytes_per_second = link_speed(device) / 1e9
    with TemporaryDirectory(prefix="kttrio-hybrid-") as scratch:
        for way, start in starts(config, standing_in, Path(scratch)):
            if start.refusal:
                console.print(f"{way}: {start.refusal}")
                continue
            findings.model = describe(start)
            measure_way(way, start, config, findings)
            gc.collect()  # what is left of a model would have the GPU's memory when the next comes
    return findings


def describe(start: Start) -> str:
    shape = start.estimate.shape
    return (
        f"{shape.num_layers} layers of {shape.num_experts} experts, {shape.top_k} used, "
        f"{start.estimate.expert_format}, on {start.machine.where}"
    )


def starts(config: HybridConfig, machine: Machine, scratch: Path) -> Iterator[tuple[str, Start]]:
    """Each way to divide the same model, with a name; all on the host comes first."""
    shape = dict(SHAPE) if config.config is None else read_json(config.config)
    shape |= {} if config.experts is None else {"num_experts": config.experts}
    layers = config.layers or largest(config, machine, shape, scratch)
    write_shape(scratch, shape, layers)
    if machine.kind == "cpu":
        yield "all on host", plan(config, replace(machine, kind="none"), scratch, None)
    for share in config.shares:
        yield f"{share} % on {machine.kind}", plan(config, machine, scratch, share)


def largest(config: HybridConfig, machine: Machine, shape: dict[str, Any], scratch: Path) -> int:
    """The most layers that fit, whatever the share."""
    shares = [None if machine.kind == "cpu" else 0, *config.shares]
    for layers in range(shape["num_hidden_layers"], 0, -LAYER_STEP):
        write_shape(scratch, shape, layers)
        if not any(plan(config, machine, scratch, share).refusal for share in shares):
            return layers
    raise ConfigError("not even a few layers fit into memory; name fewer --experts")


def write_shape(directory: Path, shape: dict[str, Any], layers: int) -> None:
    fields = shape | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(fields), "utf-8")


def plan(config: HybridConfig, machine: Machine, directory: Path, share: int | None) -> Start:
    """`share`: per cent of the experts on the device; None: there is none."""
    placement = PlacementConfig()
    if share is not None:
        placement = PlacementConfig(
            kt_gpu_experts_ratio=share / 100, kt_gpu_prefill_token_threshold=config.chunk
        )
    engine = EngineConfig(
        chunked_prefill_size=max(config.chunk, max(config.sequences) * PROMPT_TOKENS),
        max_running_requests=max(config.sequences),
        context_length=max(*config.prompts, config.steps) + ANSWER_ROOM,
    )
    experts = ExpertConfig(kt_cpuinfer=config.threads)
    asked = DeviceConfig(device="cpu" if machine.kind == "cpu" else "auto")
    model = ModelConfig(model=directory)
    return plan_start(RunnerConfig(model, experts, engine, asked, placement=placement), machine)


def measure_way(way: str, start: Start, config: HybridConfig, findings: Findings) -> None:
    loader = RandomLoader()
    runner = load_runner(start, None, load=loader)
    findings.prefill += measure_prefill(way, runner, loader, config, findings)
    for captured in (True, False):
        if captured and runner.graphs is None:
            continue
        if not captured:
            runner.graphs = None
        findings.decode += measure_decode(way, runner, config, start, captured=captured)
    runner.close()


def measure_decode(
    way: str, runner: Runner, config: HybridConfig, start: Start, *, captured: bool
) -> Iterator[DecodeCell]:
    for number in config.sequences:
        seconds = run_bare(runner, number, config.steps).step_seconds
        layers = start.estimate.shape.num_layers
        yield DecodeCell(
            way, number, captured, 1e3 * seconds, 1e6 * seconds / layers, number / seconds
        )


def measure_prefill(
    way: str, runner: Runner, loader: RandomLoader, config: HybridConfig, findings: Findings
) -> Iterator[PrefillCell]:
    prefill(runner, min(config.prompts))
    for number in config.prompts:
        before = sent_bytes(loader)
        seconds = prefill(runner, number)
        sent = sent_bytes(loader) - before
        share = sent / seconds / (findings.link_gigabytes_per_second * 1e9)
        yield PrefillCell(way, number, seconds, number / seconds, sent / 1e9, share)


def prefill(runner: Runner, num_tokens: int) -> float:
    """Seconds to the first token after a prompt that comes alone."""
    scheduler = Scheduler(runner.capacity, EngineConfig())
    ids = tuple(random.Random(num_tokens).choices(range(runner.capacity.vocab_size), k=num_tokens))
    scheduler.submit(GenerateRequest("prompt", ids, SamplingParams(1, seed=0)))
    begun = time.perf_counter()
    while (plan := scheduler.plan()) is not None:
        scheduler.commit(plan, runner.step(plan))
    return time.perf_counter() - begun


def sent_bytes(loader: RandomLoader) -> int:
    """Of experts, through the ring, so far."""
    sides = getattr(getattr(loader.model, "bank", None), "sides", None)
    return 0 if sides is None or sides.ring is None else sides.ring.sent_bytes


def measure_handoffs(device: Device) -> list[HandoffCell]:
    if device.where.type == "cpu":
        return measure_handoff(device, way="in order", captures=False)
    from kttrio.device.cuda import CudaDevice

    return [
        cell
        for way in ("host-function", "flags")
        for cell in measure_handoff(CudaDevice(device.where, handoff=way), way=way, captures=True)
    ]


def link_speed(device: Device) -> float:
    """Bytes a second of large copies to the device: the best of a few."""
    source = device.pinned(LINK_BYTES, dtype=torch.uint8).zero_()
    target = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device.where)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        device.main.run(lambda: target.copy_(source, non_blocking=True))
        device.synchronize()
        times.append(time.perf_counter() - begun)
    return LINK_BYTES / min(times)
