"""Machines to plan for."""

from __future__ import annotations

from typing import Any

from kttrio.runner.device import Machine

GIB = 2**30


def machine(*, host: int = 16 * GIB, gpu: int | None = None, **changes: Any) -> Machine:
    """One with so much memory: a CPU alone, or one with a GPU."""
    usual: dict[str, Any] = {
        "kind": "none" if gpu is None else "cuda",
        "host_bytes": host,
        "device_bytes": gpu,
        "num_cores": 8,
        "nodes": (0,),
        "fast_bfloat16": True,
    }
    return Machine(**usual | changes)


def stand_in(*, host: int = 16 * GIB) -> Machine:
    """A CPU that stands in for a device."""
    return machine(host=host, kind="cpu")
