"""Fixtures whose experts are divided between the device and the host."""

from __future__ import annotations

from pathlib import Path

import torch

from kttrio.config import ExpertConfig
from kttrio.device.base import Device
from kttrio.device.host import HostDevice
from kttrio.experts.division import Division
from kttrio.experts.placement import ExpertGrid, place
from kttrio.models.base import CausalLM, read_blueprint
from kttrio.models.loading import Extras, load_model


def divide(
    directory: Path,
    ratio: float,
    strategy: str = "uniform",
    *,
    device: Device | None = None,
    **room: int,
) -> Division:
    """So large a share of a checkpoint's experts on the device; `room` as in `Division`."""
    maps = list(read_blueprint(directory).expert_map())
    grid = ExpertGrid((True,) * len(maps), maps[0].num_experts)
    generator = torch.Generator().manual_seed(9)
    counts = torch.randint(1, 100, grid.shape, generator=generator)
    mask = place(strategy, grid, budget=int(grid.total * ratio), counts=counts)
    return Division(device or HostDevice(), mask, **room)


def load_divided(
    directory: Path,
    division: Division | None,
    *,
    dtype: torch.dtype = torch.float32,
    num_drafts: int = 0,
    max_step_tokens: int = 64,
    **experts: object,
) -> CausalLM:
    return load_model(
        directory,
        dtype=dtype,
        experts=ExpertConfig(kt_cpuinfer=1, **experts),
        max_step_tokens=max_step_tokens,
        extras=Extras(num_drafts=num_drafts),
        division=division,
    )
