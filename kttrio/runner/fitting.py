"""What of the flags this machine or this model cannot honour: fitted, and said aloud."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kttrio.config import OTHER_BACKENDS, DeviceConfig, ExpertConfig
from kttrio.models import base
from kttrio.runner.device import Kind

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

log = logging.getLogger(__name__)


def choose_dtype(wanted: str, raw: dict[str, Any], *, fast_bfloat16: bool) -> torch.dtype:
    """The dense layers' precision: what the flag says; on "auto" what the config.json says.

    There bfloat16 (or float16, which has no kernels here) gives way to float32 where the CPU would
    have to emulate it.
    """
    if wanted != "auto":
        return _DTYPES[wanted]
    stored = base.stored_dtype(raw)
    if stored is torch.float32:
        return torch.float32
    chosen = torch.bfloat16 if fast_bfloat16 and stored is torch.bfloat16 else torch.float32
    if chosen is not stored:
        log.info("dense layers stored as %s run in %s on this CPU (--dtype)", stored, chosen)
    return chosen


def fit_pool(experts: ExpertConfig, *, num_cores: int, nodes: Sequence[int]) -> ExpertConfig:
    """The settings without the threads, pools and NUMA nodes that this machine lacks."""
    threads, count, named = experts.kt_cpuinfer, experts.kt_threadpool_count, experts.kt_numa_nodes
    there = tuple(node for node in named if node in nodes)
    if there and there != named and count in (None, len(named)):
        log.warning("--kt-numa-nodes %s is reduced to %s", _listed(named), _listed(there))
        named, count = there, None
    if count is not None and not named and count > len(nodes):
        log.warning(
            "--kt-threadpool-count %d is reduced to %d: a pool for each NUMA node we may use",
            count,
            len(nodes),
        )
        count = len(nodes)
    if threads is not None and threads > num_cores:
        log.warning(
            "--kt-cpuinfer %d is reduced to one for each core: we may use %d processors",
            threads,
            num_cores,
        )
        threads = None  # one for each core, which on a machine with hyperthreads is better yet
    return replace(experts, kt_cpuinfer=threads, kt_threadpool_count=count, kt_numa_nodes=named)


def note_device(config: DeviceConfig, kind: Kind) -> None:
    """Name the flags about kernels that this device has not."""
    given = config.attention_backend
    if kind == "cuda":
        if given in OTHER_BACKENDS:
            log.warning("--attention-backend %s is not here: triton takes its place", given)
        return
    if given not in (None, "torch"):
        name_idle(["--attention-backend"], "a CPU has one kernel for each layer")
    graphs = {
        "--disable-cuda-graph": config.disable_cuda_graph,
        "--cuda-graph-max-bs": config.cuda_graph_max_bs,
        "--cuda-graph-bs": config.cuda_graph_bs,
    }
    name_idle([name for name, value in graphs.items() if value], "no CUDA graphs on a CPU")


def name_idle(flags: Sequence[str], why: str) -> None:
    """Say that these change nothing; nothing where there are none."""
    if flags:
        log.warning("without meaning here: %s (%s)", ", ".join(flags), why)


def _listed(nodes: Sequence[int]) -> str:
    return ",".join(map(str, nodes))
