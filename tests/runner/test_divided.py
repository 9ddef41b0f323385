"""Whole runners with experts on both sides: their answers are those of all experts on the host."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kttrio.config import (
    ConfigError,
    DeviceConfig,
    EngineConfig,
    ExpertConfig,
    ModelConfig,
    PlacementConfig,
    RunnerConfig,
)
from kttrio.engine.scheduler import Scheduler
from kttrio.experts.recording import read_counts
from kttrio.request import GenerateRequest, SamplingParams
from kttrio.runner.build import build_runner
from tests.golden import FIXTURES

ENGINE = EngineConfig(
    chunked_prefill_size=24, max_running_requests=4, max_total_tokens=4096, page_size=4
)
CHATS = ("qwen3_next_chat", "deepseek_v3_chat", "glm4_moe_chat")
WAYS = {
    "a few of each layer": PlacementConfig(kt_num_gpu_experts=2),
    "half of them, any": PlacementConfig(
        kt_gpu_experts_ratio=0.5, kt_expert_placement_strategy="random"
    ),
    "all of some layers": PlacementConfig(
        kt_gpu_experts_ratio=0.4, kt_expert_placement_strategy="front-loading"
    ),
    "as many as fit": PlacementConfig(kt_num_gpu_experts="auto"),
    "long prompts through the device": PlacementConfig(
        kt_num_gpu_experts=1, kt_gpu_prefill_token_threshold=16, kt_ring_experts=4
    ),
    "none to stay, all to pass": PlacementConfig(kt_gpu_prefill_token_threshold=16),
    "following what is used": PlacementConfig(
        kt_num_gpu_experts=2, kt_enable_dynamic_expert_update=True
    ),
    "following the last prompt": PlacementConfig(
        kt_num_gpu_experts=2,
        kt_enable_dynamic_expert_update=True,
        kt_dynamic_update_rule="last-chunk",
        kt_gpu_prefill_token_threshold=16,
    ),
}


def built(name, placement, tmp_path, *, engine=ENGINE, device="cpu"):
    return build_runner(
        RunnerConfig(
            ModelConfig(model=FIXTURES / name, dtype="bfloat16"),
            ExpertConfig(kt_cpuinfer=2, kt_cache_dir=tmp_path),
            engine,
            DeviceConfig(device=device),
            placement,
        )
    )


def chats(name):
    return json.loads((FIXTURES / name / "golden.json").read_text())


def answers(runner, name, engine=ENGINE):
    """Greedy, all at once, in the order of the chats."""
    scheduler = Scheduler(runner.capacity, engine)
    heard = {}
    for chat in chats(name):
        sampling = SamplingParams(max_tokens=len(chat["answer_ids"]), temperature=0.0, seed=0)
        request = GenerateRequest(chat["name"], tuple(chat["prompt_ids"]), sampling)
        heard[scheduler.submit(request)] = []
    while (plan := scheduler.plan()) is not None:
        for sequence, event in scheduler.commit(plan, runner.step(plan)):
            assert event.error is None
            heard[sequence].append(event.token)
    return list(heard.values())


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("way", WAYS)
def test_greedy_answers_are_those_of_transformers(name, way, tmp_path):
    runner = built(name, WAYS[way], tmp_path)
    try:
        assert answers(runner, name) == [chat["answer_ids"] for chat in chats(name)]
    finally:
        runner.close()


def test_drafts_do_not_change_them_either(tmp_path):
    engine = replace(ENGINE, speculative_algorithm="MTP", speculative_num_draft_tokens=2)
    runner = built("qwen3_next_chat", WAYS["following what is used"], tmp_path, engine=engine)
    found = answers(runner, "qwen3_next_chat", engine)
    runner.close()
    assert found == [chat["answer_ids"] for chat in chats("qwen3_next_chat")]


def test_what_was_learnt_is_there_at_the_next_start(tmp_path, caplog):
    caplog.set_level("INFO")
    for known in (False, True):
        runner = built("qwen3_next_chat", WAYS["following what is used"], tmp_path)
        answers(runner, "qwen3_next_chat")
        runner.close()
        (file,) = tmp_path.glob("placement-*.pt")
        assert ("are known from" in caplog.text) == known
    assert read_counts(file).shape == (1, 4, 8)


def test_a_recording_of_another_model_is_refused(tmp_path):
    runner = built("qwen3_next_chat", WAYS["following what is used"], tmp_path)
    answers(runner, "qwen3_next_chat")
    runner.close()
    (file,) = tmp_path.glob("placement-*.pt")
    wrong = PlacementConfig(kt_num_gpu_experts=2, init_expert_location=str(file))
    with pytest.raises(ConfigError, match=r"is of 4 x 8 experts, the model has \d+ x \d+ "):
        built("deepseek_v3_chat", wrong, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is the GPU here")
def test_without_a_device_placement_changes_nothing_and_is_named(tmp_path, caplog):
    nothing_in_it = tmp_path / "counts.pt"
    nothing_in_it.touch()
    placement = PlacementConfig(kt_num_gpu_experts=99, init_expert_location=str(nothing_in_it))
    runner = built("qwen3_next_chat", placement, tmp_path, device="auto")
    found, counts = answers(runner, "qwen3_next_chat"), runner.count()
    runner.close()
    assert found == [chat["answer_ids"] for chat in chats("qwen3_next_chat")]
    assert counts == {}
    assert "device" not in runner.facts
    assert "--kt-num-gpu-experts, --init-expert-location (no GPU, every expert" in caplog.text


def test_frequency_takes_what_was_used_most(tmp_path):
    runner = built("qwen3_next_chat", WAYS["following what is used"], tmp_path)
    answers(runner, "qwen3_next_chat")
    runner.close()
    (file,) = tmp_path.glob("placement-*.pt")
    placement = PlacementConfig(
        kt_num_gpu_experts=2,
        kt_expert_placement_strategy="frequency",
        init_expert_location=str(file),
    )
    runner = built("qwen3_next_chat", placement, tmp_path)
    residencies = runner._model.bank.sides.residencies
    runner.close()
    counts = read_counts(file).sum(0).flatten()
    chosen = [r.mask for r in residencies]
    taken = counts[[e for mask in chosen for e in mask.tolist()]]
    assert sorted(taken.tolist()) == sorted(counts.tolist())[-8:]
