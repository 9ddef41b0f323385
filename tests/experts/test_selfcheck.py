"""What is wrong with loaded experts is found before anybody is served."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from kttrio.config import ExpertConfig
from kttrio.device.host import HostDevice
from kttrio.experts import selfcheck
from kttrio.experts.bank import ExpertBank
from kttrio.experts.division import Division
from kttrio.experts.selfcheck import Checked, ExpertsDiffer, check_experts
from kttrio.models.loading import estimate, load_model
from tests.golden import FIXTURES

NAME = "qwen3_next_fp8"
WAYS = ("on the device", "on the host", "in long prompts", "on both sides")


def division(name: str, *, every: int = 2) -> Division:
    """Every second expert on the device."""
    grid = estimate(FIXTURES / name, dtype=torch.float32, experts=ExpertConfig()).grid
    mask = torch.zeros(len(grid.layers), grid.num_experts, dtype=torch.bool)
    mask[:, ::every] = True
    return Division(HostDevice(), mask, num_ring_slots=2)


def load(cache: Path, name: str = NAME, **settings) -> None:
    dtype, method = settings.get("dtype", torch.float32), settings.get("method", "auto")
    load_model(
        FIXTURES / name,
        dtype=dtype,
        experts=ExpertConfig(kt_cpuinfer=2, kt_method=method, kt_cache_dir=cache),
        max_step_tokens=64,
        division=settings.get("division"),
    ).close()


def spoiled(spoil):
    """The check as it is, of a bank that something has happened to."""

    def check(bank: ExpertBank, checked: Checked) -> None:
        spoil(bank)
        check_experts(bank, checked)

    return patch("kttrio.models.loading.check_experts", check)


@pytest.mark.parametrize("name", ["qwen3_next_fp8", "deepseek_v3_chat"])
@pytest.mark.parametrize("method", ["auto", "int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_passes_on_every_way(tmp_path, name, method, dtype):
    seen = []
    original = selfcheck._error

    def error(bank, layer, way, truth, *, top_k):
        found = original(bank, layer, way, truth, top_k=top_k)
        seen.append((way.name, found))
        return found

    with patch.object(selfcheck, "_error", error):
        load(tmp_path, name, method=method, dtype=dtype, division=division(name))
        load(tmp_path, name, method=method, dtype=dtype)
    assert [way for way, _ in seen] == [*WAYS, "on the host"]
    coarse = {"int4": "int8"}.get(method, str(dtype).removeprefix("torch."))
    tolerance = selfcheck.TOLERANCES["float32" if dtype is torch.float32 else coarse]
    assert max(found for _, found in seen) < tolerance / 2


def test_a_spoiled_slot_is_found(tmp_path):
    def spoil(bank):
        bank.sides.slots.slot(0).down.data.view(torch.uint8).bitwise_xor_(0x80)

    with spoiled(spoil), pytest.raises(ExpertsDiffer, match="experts on the device give something"):
        load(tmp_path, division=division(NAME))


def test_a_spoiled_expert_of_the_host_is_found(tmp_path):
    def spoil(bank):
        bank.host_layers[0].clear_expert(1)
        bank.sides.slots.slot(0).pack_into(bank.host_layers[0], 1)

    with spoiled(spoil), pytest.raises(ExpertsDiffer, match="experts on the host give something"):
        load(tmp_path, division=division(NAME))


def test_tables_that_name_each_others_slots_are_found(tmp_path):
    def spoil(bank):
        table = bank.sides.residencies[0]
        first, second = table.host_slot_of[[0, 6]].tolist()
        table.place(0, second)
        table.place(6, first)

    with spoiled(spoil), pytest.raises(ExpertsDiffer, match="experts on the device give something"):
        load(tmp_path, division=division(NAME))


def test_experts_on_the_host_alone_are_checked_too(tmp_path):
    def spoil(bank):
        layer = bank.host_layers[0]
        shape = (layer.intermediate_size, layer.hidden_size)
        gate = up = torch.zeros(shape, dtype=torch.bfloat16)
        down = gate.T.contiguous()
        layer.set_expert(0, gate=gate, up=up, down=down)

    with spoiled(spoil), pytest.raises(ExpertsDiffer, match=r"layers\.0\..*Try --kt-isa avx2"):
        load(tmp_path, "qwen3_next_chat")
