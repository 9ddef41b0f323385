"""From `--device` to a device and what there is of it: is it usable, and how much memory has it?

What a CPU alone offers is in machine.py; what a device does beside computing, in kttrio/device/.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import torch

from kttrio.config import ConfigError
from kttrio.device.base import Device
from kttrio.device.cuda import CudaDevice
from kttrio.device.host import HostDevice
from kttrio.runner.machine import (
    available_cores,
    available_memory,
    available_nodes,
    has_fast_bfloat16,
)

Kind = Literal["none", "cpu", "cuda"]
"""none: the CPU does everything; cpu: it stands in for a device beside itself."""

LEAST_CAPABILITY = (8, 0)  # bfloat16 products, and what the Triton kernels are written for
CONTEXT_BYTES = 2**29  # what CUDA and its libraries take of a GPU before the first tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a server may use."""

    kind: Kind
    host_bytes: int
    device_bytes: int | None
    """Of the device's own memory; None where it has none but the host's."""
    num_cores: int
    nodes: tuple[int, ...]
    fast_bfloat16: bool
    """Where the dense layers run."""
    name: str = ""
    """Of the GPU."""

    @property
    def where(self) -> torch.device:
        """Of the dense layers."""
        return torch.device("cuda" if self.kind == "cuda" else "cpu")


def find_machine(wanted: str) -> Machine:
    """This machine, with the device that `--device` names.

    Raises ConfigError where cuda is asked for and cannot be used.
    """
    kind = choose_kind(wanted, missing_for_cuda())
    return Machine(
        kind=kind,
        host_bytes=available_memory(),
        device_bytes=torch.cuda.mem_get_info()[0] if kind == "cuda" else None,
        num_cores=available_cores(),
        nodes=tuple(available_nodes()),
        fast_bfloat16=kind == "cuda" or has_fast_bfloat16(),
        name=torch.cuda.get_device_name() if kind == "cuda" else "",
    )


def imagined_machine(wanted: str, *, host_bytes: int | None, device_bytes: int | None) -> Machine:
    """This machine with memories of other sizes; one with a GPU of `device_bytes` where that is
    given, as it was before anything ran on it."""
    if wanted == "cpu" and device_bytes is not None:
        raise ConfigError("--gpu-memory is a GPU's, but --device is cpu; leave one of them away")
    if device_bytes is None:
        found = find_machine(wanted)
    else:
        found = _with_gpu(max(device_bytes - CONTEXT_BYTES, 0))
    return found if host_bytes is None else replace(found, host_bytes=host_bytes)


def _with_gpu(device_bytes: int) -> Machine:
    return Machine(
        kind="cuda",
        host_bytes=available_memory(),
        device_bytes=device_bytes,
        num_cores=available_cores(),
        nodes=tuple(available_nodes()),
        fast_bfloat16=True,
    )


def choose_kind(wanted: str, missing: str) -> Kind:
    """What `--device` means where `missing` keeps CUDA from being used, if it is not empty."""
    if wanted == "cpu":
        return "cpu"
    if wanted == "cuda" and missing:
        raise ConfigError(f"--device cuda: {missing}; --device auto takes the CPU")
    return "none" if missing else "cuda"


def missing_for_cuda() -> str:
    """What keeps the GPU from being used; empty where nothing does."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install one that is (https://pytorch.org)"
    if not torch.cuda.is_available():
        return "torch finds no GPU with a driver it can use; nvidia-smi should list one"
    missing = _missing_on_gpu(torch.cuda.get_device_capability(), has_triton=_has("triton"))
    missing = missing or _why_nothing_runs()
    if missing:
        log.warning("the GPU is left alone: %s", missing)
    return missing


def _missing_on_gpu(capability: tuple[int, int], *, has_triton: bool) -> str:
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        return f"the GPU has compute capability {found}, but {least} is the least"
    return "" if has_triton else "triton is missing, which its kernels need; pip install triton"


def _why_nothing_runs() -> str:
    """Empty where the GPU computes, and Triton has found what it builds launches with."""
    try:
        torch.ones(1, device="cuda").item()
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        return f"torch cannot compute on the GPU ({why}); install one that is built for it"
    try:
        from triton.runtime import driver  # CPU-only installations have none

        driver.active.get_current_target()
    except Exception as error:  # whatever goes wrong in a compiler of C
        return f"triton cannot launch kernels ({error}); it needs gcc and Python's header files"
    return ""


def _has(module: str) -> bool:
    return find_spec(module) is not None


def open_device(kind: Kind) -> Device | None:
    """The seam to it; None where the CPU does everything."""
    if kind == "cuda":
        return CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    return HostDevice() if kind == "cpu" else None
