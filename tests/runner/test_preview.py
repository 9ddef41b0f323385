from __future__ import annotations

import json
from pathlib import Path

import pytest

from kttrio.config import DeviceConfig, EngineConfig, ModelConfig, PlacementConfig, RunnerConfig
from kttrio.runner.planning import plan_start
from kttrio.runner.preview import report
from tests.machines import machine, stand_in

FIXTURES = Path(__file__).parents[1] / "fixtures"
ENGINE = EngineConfig(max_running_requests=2, chunked_prefill_size=64)


def look(name, on=None, *, placement=None, **model):
    """The report of a fixture on a small machine."""
    config = RunnerConfig(
        ModelConfig(model=FIXTURES / name, dtype="float32", **model),
        engine=ENGINE,
        device=DeviceConfig(),
        placement=placement or PlacementConfig(),
    )
    return report(plan_start(config, on or machine(host=2**30)))


def test_the_report_adds_up():
    found = look("qwen3_next_fp8")
    assert found["precision"] == "float32"
    assert found["experts"]["format"] == "fp8"
    (memory,) = found["memories"]
    assert memory["bytes"] == sum(row["bytes"] for row in found["memory"])
    sizes = {row["kind"]: row["bytes"] for row in found["weights"]}
    rows = {row["name"]: row["bytes"] for row in found["memory"]}
    assert sizes.pop("routed experts") == rows["experts"]
    assert sum(sizes.values()) == rows["dense weights"]
    layers, experts = found["shape"]["num_layers"], found["shape"]["num_experts"]
    assert found["experts"]["number"] == layers * experts
    assert found["experts"]["bytes_each"] * layers * experts == rows["experts"]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("on", [stand_in(host=2**30), machine(host=2**30, gpu=2**29)])
def test_what_is_on_the_device_is_not_on_the_host(on):
    placement = PlacementConfig(kt_num_gpu_experts=3)
    found, alone = look("qwen3_next_fp8", on, placement=placement), look("qwen3_next_fp8")
    rows, before = (
        {row["name"]: row["bytes"] for row in each["memory"]} for each in (found, alone)
    )
    assert rows["experts"] + rows["device experts"] == before["experts"]
    assert rows["device experts"] == found["experts"]["on_device"] * found["experts"]["bytes_each"]
    assert found["experts"]["on_device"] == 3 * found["shape"]["num_layers"]
    for memory in found["memories"]:
        here = [row["bytes"] for row in found["memory"] if row["where"] == memory["where"]]
        assert memory["bytes"] == sum(here) <= memory["budget_bytes"]


def test_a_model_that_sees_can_be_planned_without_its_eyes():
    whole, blind = (look("qwen3_5_moe", language_model_only=only) for only in (False, True))
    assert {"vision"} == kinds(whole) - kinds(blind)
    assert "image scratch" in [row["name"] for row in whole["memory"]]
    assert "image scratch" not in [row["name"] for row in blind["memory"]]
    assert whole["parameters"] > blind["parameters"]


def kinds(found):
    return {row["kind"] for row in found["weights"]}
