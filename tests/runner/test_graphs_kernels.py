"""Around the kernels of a decode step nothing waits for the device or makes tensors of Python
values: what calls them is captured here with launches that do nothing, as only a GPU could capture
the kernels themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton: pip install triton")

from triton.runtime.jit import KernelInterface

from kttrio.config import ExpertConfig
from kttrio.device.host import HostDevice
from kttrio.experts import hybrid
from kttrio.experts.division import Division
from kttrio.layers.triton import grouped as triton_grouped
from kttrio.models.base import read_blueprint
from kttrio.models.loading import load_model
from kttrio.runner.graphs import DecodeGraphs, GraphRoom
from tests.golden import FIXTURES

KERNELS = {
    "deepseek_v3": ["mla"],
    "deepseek_v32": ["dsa"],
    "glm4_moe": ["attention_decode"],
    "glm_moe_dsa": ["dsa"],
    "kimi_k2": ["mla"],
    "minimax_m2": ["attention_decode"],
    "qwen3_5_moe": ["attention_decode", "gdn"],
    "qwen3_moe": ["attention_decode"],
    "qwen3_next": ["attention_decode", "gdn"],
}
FAMILIES = sorted(file.parent for file in FIXTURES.glob("*/golden.safetensors"))


def grouped_mlp(*args, fixed, **kwargs):
    """As on a GPU, whatever the device."""
    assert fixed
    triton_grouped.grouped_mlp(*args, **kwargs)


@contextmanager
def idle_kernels() -> Iterator[set[str]]:
    """Launches tell the kernel's module and do nothing else."""
    launched: set[str] = set()

    def launcher(kernel, grid):
        return lambda *args, **constants: launched.add(kernel.fn.__module__.rpartition(".")[2])

    with ExitStack() as patches:
        for kind in (KernelInterface, *KernelInterface.__subclasses__()):
            if "__getitem__" in vars(kind):
                patches.enter_context(patch.object(kind, "__getitem__", launcher))
        patches.enter_context(patch.object(hybrid, "grouped_mlp", grouped_mlp))
        yield launched


@pytest.mark.parametrize("directory", FAMILIES, ids=lambda directory: directory.name)
def test_a_decode_step_with_kernels_can_be_captured(directory):
    device, blueprint = HostDevice(), read_blueprint(directory)
    num_layers = sum(1 for _ in blueprint.expert_map())
    mask = torch.arange(num_layers * blueprint.shape.num_experts) % 2 == 0
    model = load_model(
        directory,
        dtype=torch.bfloat16,
        experts=ExpertConfig(kt_cpuinfer=1),
        max_step_tokens=16,
        division=Division(device, mask.view(num_layers, -1)),
        backend="triton",
    )
    caches = model.new_caches(num_pages=9, page_size=16, num_slots=5)
    room = GraphRoom(page_size=16, max_pages=2, spare_page=8, spare_slot=4)
    with idle_kernels() as launched:
        DecodeGraphs(model, caches, room=room, sizes=(1, 4), device=device)
    family = directory.name.removesuffix("_fp8")
    dense = {"fp8_linear"} if family != directory.name else set()
    assert launched == {"grouped", *KERNELS[family]} | dense
    model.close()
