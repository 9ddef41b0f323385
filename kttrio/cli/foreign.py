"""Flags that launch commands of SGLang and KTransformers carry and that kttrio has no setting for.

Most of them choose among things that are not there (GPU kernels, CUDA graphs, several devices):
they are taken and named once at the start, so that a known command line works and nobody believes
in a switch that does nothing. Numbers of devices are brought down to one. Of others only those
values are taken that hold here anyway, and some are refused with what to do instead. A flag that
is not here either is unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field, fields, make_dataclass
from typing import Any

from kttrio.cli.flags import flag_name


def _idle(why: str, *, switches: str = "", values: str = "", lists: str = "") -> Iterator[Any]:
    """Fields of flags that mean nothing here, and why not."""
    for names, kind in (
        (switches, bool),
        (values, str | None),
        (lists, tuple[str, ...]),
    ):
        for name in names.split():
            yield _field(name, kind, why=why)


def _fixed(names: str, choices: str, mend: str) -> Iterator[Any]:
    """Fields of flags that may only say what holds anyway."""
    for name in names.split():
        yield _field(name, str | None, choices=tuple(choices.split()), mend=mend)


def _reduced(names: str, why: str) -> Iterator[Any]:
    """Fields of numbers that can only be 1 here; more of them is brought down to it, aloud."""
    for name in names.split():
        yield _field(name, int | None, least=1, reduced=why)


def _refused(names: str, why: str) -> Iterator[Any]:
    """Fields of flags that no value makes right."""
    for name in names.split():
        yield _field(name, tuple[str, ...], refused=why)


def _field(name: str, kind: Any, **metadata: Any) -> tuple[str, Any, Any]:
    default: Any = False if kind is bool else () if kind == tuple[str, ...] else None
    return name.replace("-", "_"), kind, field(default=default, metadata={"help": ""} | metadata)


_IDLE = (
    *_idle(
        "a checkpoint's code is never run",
        switches="trust-remote-code",
    ),
    *_idle(
        "checkpoints are local directories of safetensors",
        values="download-dir revision model-loader-extra-config",
        switches="weight-loader-disable-mmap",
    ),
    *_idle(
        "there is one kernel for each layer",
        values="prefill-attention-backend decode-attention-backend "
        "mm-attention-backend nsa-prefill-backend nsa-decode-backend linear-attn-backend "
        "linear-attn-decode-backend linear-attn-prefill-backend mamba-backend fp8-gemm-backend "
        "fp4-gemm-backend moe-runner-backend sampling-backend grammar-backend "
        "speculative-attention-mode speculative-draft-attention-backend "
        "speculative-moe-runner-backend triton-attention-num-kv-splits torch-compile-max-bs",
        switches="disable-shared-experts-fusion disable-flashinfer-autotune enable-torch-compile "
        "enable-fused-qk-norm-rope flashinfer-mla-disable-ragged disable-chunked-prefix-cache "
        "triton-attention-reduce-in-fp32 disable-fast-image-processor",
    ),
    *_idle(
        "decode steps are captured as they are, others are not",
        switches="disable-cuda-graph-padding enable-profile-cuda-graph enable-cudagraph-gc "
        "enable-piecewise-cuda-graph",
    ),
    *_idle(
        "one process, one device",
        values="nccl-port dist-init-addr nccl-init-addr dist-timeout base-gpu-id gpu-id-step "
        "load-balance-method deepep-mode tokenizer-worker-num",
        switches="enable-p2p-check disable-custom-all-reduce enable-nccl-nvls enable-symm-mem "
        "enable-torch-symm-mem enable-mscclpp enable-flashinfer-allreduce-fusion "
        "enable-dp-attention enable-dp-lm-head enable-two-batch-overlap "
        "enable-single-batch-overlap",
    ),
    *_idle(
        "a step always takes running and new requests together, in the order they came",
        values="schedule-policy schedule-conservativeness num-continuous-decode-steps "
        "scheduler-recv-interval",
        switches="enable-mixed-chunk disable-overlap-schedule",
    ),
    *_idle(
        "--chunked-prefill-size alone bounds a step",
        values="max-prefill-tokens prefill-max-requests",
        switches="enable-dynamic-chunking",
    ),
    *_idle(
        "every token is sent at once",
        values="stream-interval",
    ),
    *_idle(
        "no prefixes are kept",
        values="radix-eviction-policy",
        switches="disable-radix-cache enable-cache-report",
    ),
    *_idle(
        "a state is reserved for each running request",
        values="max-mamba-cache-size mamba-full-memory-ratio mamba-scheduler-strategy "
        "mamba-track-interval swa-full-tokens-ratio",
    ),
    *_idle(
        "the experts are on the CPU, the rest is not divided",
        values="cpu-offload-gb",
    ),
    *_idle(
        "a failed step answers at once, idle threads sleep",
        values="watchdog-timeout soft-watchdog-timeout",
        switches="sleep-on-idle",
    ),
    *_idle(
        "memory is touched, and a GPU takes its first steps, before the port opens",
        values="warmups",
        switches="skip-server-warmup",
    ),
    *_idle(
        "what requests say is never logged; --access-log has a line for each, /metrics the counts",
        values="log-level-http log-requests-level log-requests-format decode-log-interval "
        "crash-dump-folder",
        switches="log-requests show-time-cost enable-request-time-stats-logging",
    ),
    *_idle(
        "/metrics is always there",
        switches="enable-metrics",
    ),
    *_idle(
        "--speculative-num-draft-tokens says it all",
        values="speculative-num-steps",
    ),
)

_REDUCED = (
    *_reduced(
        "tensor-parallel-size tp-size tp data-parallel-size dp-size pipeline-parallel-size "
        "pp-size expert-parallel-size ep-size ep moe-dense-tp-size",
        "one process, one device",
    ),
)

_ONE_DEVICE = "kttrio runs in one process on one device; leave the flag away"

_FIXED = (
    *_fixed("nnodes", "1", _ONE_DEVICE),
    *_fixed("node-rank", "0", _ONE_DEVICE),
    *_fixed("moe-a2a-backend", "none", _ONE_DEVICE),
    *_fixed("disaggregation-mode", "null", _ONE_DEVICE),
    *_fixed("load-format", "auto safetensors", "only safetensors files are read"),
    *_fixed(
        "kv-cache-dtype",
        "auto bf16 bfloat16",
        "the cache keeps the precision of the model, coarser ones change answers",
    ),
    *_fixed("mamba-ssm-dtype", "float32", "recurrent states are kept in float32"),
    *_fixed("sampling-defaults", "model", "defaults come from generation_config.json"),
    *_fixed("speculative-eagle-topk", "1", "drafts are a chain, not a tree"),
)

_REFUSED = (
    *_refused(
        "quantization",
        "the checkpoint's tensors tell what they are; leave the flag away, or quantise the experts "
        "with --kt-method",
    ),
    *_refused("json-model-override-args", "change the checkpoint's config.json"),
    *_refused(
        "speculative-draft-model-path speculative-draft-model",
        "drafts come from the checkpoint's own layer: --speculative-algorithm MTP alone",
    ),
    *_refused(
        "enable-lora lora-paths kt-lora-path kt-expert-lora-path",
        "adapters are not supported; merge them into the checkpoint",
    ),
)

FOREIGN = make_dataclass(
    "Foreign", [*_IDLE, *_REDUCED, *_FIXED, *_REFUSED], frozen=True, slots=True
)
"""The flags of this file as one more record of the command line."""


def name_idle(foreign: Any) -> str:
    """The line that names every given flag without meaning here; empty when there is none.

    `foreign` is a `FOREIGN`.
    """
    given: dict[str, list[str]] = {}
    for item in fields(foreign):
        if "why" in item.metadata and getattr(foreign, item.name) != item.default:
            given.setdefault(item.metadata["why"], []).append(flag_name(item.name))
    return "; ".join(f"{', '.join(names)} ({why})" for why, names in given.items())


def name_reduced(foreign: Any) -> list[str]:
    """A line for each number that the machine cannot honour."""
    return [
        f"{flag_name(item.name)} {value} is reduced to 1: {item.metadata['reduced']}"
        for item in fields(foreign)
        if "reduced" in item.metadata and (value := getattr(foreign, item.name) or 1) > 1
    ]


def foreign_notes(foreign: Any) -> Iterator[str]:
    """What to say aloud of the given flags, line by line; `foreign` is a `FOREIGN`."""
    idle = name_idle(foreign)
    if idle:
        yield f"without meaning here: {idle}"
    yield from name_reduced(foreign)
