"""Whole runners on a device with a memory of its own: nothing is taken together that is not in one
place, and a step waits for the device where it must."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest

from kttrio.config import (
    DeviceConfig,
    EngineConfig,
    ExpertConfig,
    ModelConfig,
    PlacementConfig,
    RunnerConfig,
)
from kttrio.device.host import HostDevice
from kttrio.engine.scheduler import Scheduler
from kttrio.request import GenerateRequest, SamplingParams
from kttrio.runner import build
from kttrio.runner.build import build_runner, load_runner
from kttrio.runner.device import Machine
from kttrio.runner.planning import plan_start
from tests.apart import APART, ApartDevice, held_bytes, watched
from tests.fakes import RuledConstraint
from tests.golden import FIXTURES
from tests.machines import GIB, machine
from tests.pictures import image_input

CHATS = sorted(path.name for path in FIXTURES.glob("*_chat"))
ENGINE = EngineConfig(
    chunked_prefill_size=24, max_running_requests=4, max_total_tokens=4096, page_size=4
)
DRAFTING = replace(ENGINE, speculative_algorithm="MTP", speculative_num_draft_tokens=2)
PASSING = PlacementConfig(kt_gpu_prefill_token_threshold=16, kt_ring_experts=4)
MOVING = PlacementConfig(
    kt_num_gpu_experts=2,
    kt_enable_dynamic_expert_update=True,
    kt_gpu_prefill_token_threshold=16,
    kt_max_deferred_experts_per_token=1,
)
NUM_TOKENS = 4


@pytest.fixture
def apart(monkeypatch):
    monkeypatch.setattr(build, "open_device", lambda kind: ApartDevice())
    monkeypatch.setattr(Machine, "where", APART)


def config_of(name, placement, tmp_path, *, engine=ENGINE, device="cpu"):
    return RunnerConfig(
        ModelConfig(model=FIXTURES / name, dtype="bfloat16"),
        ExpertConfig(kt_cpuinfer=1, kt_cache_dir=tmp_path),
        engine,
        DeviceConfig(device=device, attention_backend="torch"),
        placement,
    )


@contextmanager
def running(name, placement, tmp_path, engine=ENGINE):
    runner = build_runner(config_of(name, placement, tmp_path, engine=engine))
    try:
        yield runner
    finally:
        runner.close()


def chats(name):
    return json.loads((FIXTURES / name / "golden.json").read_text())[:2]


def results_of(runner, requests, engine=ENGINE):
    """Of requests that run together: what each step found, and the plans."""
    scheduler = Scheduler(runner.capacity, engine)
    for request in requests:
        scheduler.submit(request)
    while (plan := scheduler.plan()) is not None:
        result = runner.step(plan)
        yield plan, result
        scheduler.commit(plan, result)


def tokens_of(runner, name, engine=ENGINE):
    """The first greedy ones of each chat."""
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, seed=0)
    scheduler = Scheduler(runner.capacity, engine)
    requests = [GenerateRequest(c["name"], tuple(c["prompt_ids"]), params) for c in chats(name)]
    heard = {scheduler.submit(request): [] for request in requests}
    while (plan := scheduler.plan()) is not None:
        for sequence, event in scheduler.commit(plan, runner.step(plan)):
            assert event.error is None
            heard[sequence].append(event.token)
    return list(heard.values())


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("name", CHATS)
def test_all_families_answer_as_transformers_do(name, tmp_path):
    placement = replace(MOVING, kt_max_deferred_experts_per_token=0)
    with watched(), running(name, placement, tmp_path) as runner:
        found = tokens_of(runner, name)
    assert found == [chat["answer_ids"][:NUM_TOKENS] for chat in chats(name)]


@pytest.mark.usefixtures("apart")
def test_drafts_are_made_there_too(tmp_path):
    name = "qwen3_next_chat"
    with watched(), running(name, PASSING, tmp_path, DRAFTING) as runner:
        found = tokens_of(runner, name, DRAFTING)
    assert found == [chat["answer_ids"][:NUM_TOKENS] for chat in chats(name)]


@pytest.mark.usefixtures("apart")
def test_a_start_as_on_a_gpu_takes_no_more_than_its_plan(tmp_path, caplog):
    caplog.set_level("INFO")
    name = "qwen3_next_chat"
    start = plan_start(config_of(name, MOVING, tmp_path, device="cuda"), machine(gpu=GIB))
    with watched():
        runner = load_runner(start, None)
        held, found = held_bytes(), tokens_of(runner, name)
        runner.close()
    assert "the first steps took" in caplog.text
    assert found == [chat["answer_ids"][:NUM_TOKENS] for chat in chats(name)]
    rows = {row.name: row.num_bytes for row in start.plan.rows if row.where != "cpu"}
    scratch = ("step scratch", "device expert scratch", "GPU libraries")
    least = sum(rows[row] for row in ("device experts", "expert ring", "dense weights", "KV cache"))
    assert least <= held <= sum(rows.values()) - sum(rows[row] for row in scratch)


SAMPLINGS = (
    {"temperature": 0.7, "top_p": 0.8, "logprobs": 3},
    {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"frequency_penalty": 0.4, "logit_bias": ((3, 2.0), (7, -5.0)), "prompt_logprobs": 1},
    {"temperature": 0.0, "min_tokens": 6, "stop_token_ids": frozenset((2, 5))},
)


def test_every_way_to_sample_is_the_same_there(tmp_path, monkeypatch):
    name, found, placement = "qwen3_next_chat", [], PlacementConfig(kt_num_gpu_experts=2)
    for device, where in ((HostDevice(), Machine.where), (ApartDevice(), APART)):
        monkeypatch.setattr(build, "open_device", lambda kind, device=device: device)
        monkeypatch.setattr(Machine, "where", where)
        with watched(), running(name, placement, tmp_path) as runner:
            found.append([step.chunks for _, step in results_of(runner, sampled_requests())])
    assert found[0] == found[1]


def sampled_requests():
    """In every way, and every other one under masks."""
    for i, params in enumerate(SAMPLINGS):
        sampling = SamplingParams(max_tokens=7, seed=i, **params)
        constraint = RuledConstraint(most_tokens) if i % 2 else None
        yield GenerateRequest(str(i), (5, 9, 4 + i) * 9, sampling, constraint=constraint)


def most_tokens(outputs):
    return [token for token in range(2000) if (token + len(outputs)) % 5]


def test_images_are_seen_there(tmp_path, monkeypatch):
    side = 32  # of a token, in pixels
    picture = image_input(3, 2, 2, token_side=side, pixels=bytes(range(256)) * 48)
    params = SamplingParams(max_tokens=4, seed=0, temperature=0.0, logprobs=2)
    request = GenerateRequest("picture", tuple(range(11)), params, (picture,))
    found = []
    for device, where in ((HostDevice(), Machine.where), (ApartDevice(), APART)):
        monkeypatch.setattr(build, "open_device", lambda kind, device=device: device)
        monkeypatch.setattr(Machine, "where", where)
        with watched(), running("qwen3_5_moe", PASSING, tmp_path) as runner:
            found.append([step.chunks for _, step in results_of(runner, [request])])
    assert found[0] == found[1]


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("name", ["qwen3_next_chat", "deepseek_v32_chat", "minimax_m2_chat"])
def test_a_decode_step_waits_once_for_the_device(name, tmp_path):
    """For its results. Experts on the device would be torch's here, which looks who was chosen;
    and where the best tokens are asked for it is looked which of them are equal."""
    samplings = ({"temperature": 0.0, "logprobs": 0}, {"presence_penalty": 0.5}, {"logprobs": 0})
    params = [SamplingParams(max_tokens=9, seed=0, **sampling) for sampling in samplings]
    constraints = (RuledConstraint(most_tokens), RuledConstraint(most_tokens), None)
    requests = [
        GenerateRequest(str(i), (1, 2, 3), own, constraint=constraint)
        for i, (own, constraint) in enumerate(zip(params, constraints, strict=True))
    ]
    waits = []
    with watched() as watch, running(name, PASSING, tmp_path) as runner:
        watch.waits.clear()
        for plan, _ in results_of(runner, requests):
            if all(len(chunk.token_ids) == 1 for chunk in plan.chunks):
                waits.append(list(watch.waits))
            watch.waits.clear()
    assert waits == [["to"]] * 8
