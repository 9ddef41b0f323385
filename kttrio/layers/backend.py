"""Who computes the dense layers: torch alone, or Triton kernels wherever there is one."""

from __future__ import annotations

from typing import Literal

Backend = Literal["torch", "triton"]
