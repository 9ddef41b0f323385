"""Long prompts through whole models of every family: layer by layer they get what chunks get."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from kttrio.config import (
    DeviceConfig,
    EngineConfig,
    ExpertConfig,
    ModelConfig,
    PlacementConfig,
    RunnerConfig,
)
from kttrio.engine.scheduler import Scheduler
from kttrio.request import GenerateRequest, SamplingParams
from kttrio.runner.build import build_runner
from kttrio.runner.runner import Runner
from tests.golden import FIXTURES, load_golden
from tests.pictures import image_input

CHATS = sorted(file.parent for file in FIXTURES.glob("*_chat/golden.json"))
GOLDEN = sorted(file.parent for file in FIXTURES.glob("*/golden.safetensors"))
ON_BOTH_SIDES = ("deepseek_v32", "glm_moe_dsa", "qwen3_5_moe", "qwen3_moe_fp8", "qwen3_next")
ENGINE = EngineConfig(
    chunked_prefill_size=12, max_running_requests=4, max_total_tokens=320, page_size=4
)


@pytest.fixture(scope="module", params=GOLDEN, ids=lambda directory: directory.name)
def checkpoint(request):
    return request.param


@pytest.fixture(scope="module")
def runner(checkpoint):
    drafting = "mtp_logits" in load_golden(checkpoint)
    engine = replace(ENGINE, speculative_algorithm="MTP" if drafting else None)
    model = ModelConfig(model=checkpoint, dtype="float32")
    runner = build_runner(RunnerConfig(model, ExpertConfig(kt_cpuinfer=2), engine))
    yield runner
    runner.close()


def with_long(runner, long_tokens, max_long_tokens):
    """The same model and caches, for long prompts."""
    capacity = replace(runner.capacity, long_tokens=long_tokens, max_long_tokens=max_long_tokens)
    return Runner(
        runner._model,
        runner._caches,
        capacity=capacity,
        device=torch.device("cpu"),
        tower=runner._model.vision,
    )


def heard(runner, requests):
    """Every event of each request; the long ones take a unit in each step."""
    scheduler, plans = Scheduler(runner.capacity, ENGINE), []
    events = {scheduler.submit(request): [] for request in requests}
    with (
        patch("kttrio.runner.passage._SHARE", 0.0),
        patch("kttrio.runner.passage._ALONE", 0.0),
    ):
        while (plan := scheduler.plan()) is not None:
            plans.append(plan)
            for sequence, event in scheduler.commit(plan, runner.step(plan)):
                assert event.error is None
                events[sequence].append(event)
    return list(events.values()), plans


def request(ids, max_tokens, **sampling):
    params = {"seed": 1, "temperature": 0.0, "logprobs": 0, **sampling}
    return GenerateRequest("r", tuple(ids), SamplingParams(max_tokens, **params))


def scores(events):
    """Of the prompt's tokens, then of the answer's."""
    prompt = [score.logprob for score in events[0].prompt_logprobs or () if score]
    return torch.tensor(prompt + [event.logprob.logprob for event in events])


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert [event.token for event in ours] == [event.token for event in theirs]
        torch.testing.assert_close(scores(ours), scores(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("least", "most"), [(41, 41), (13, 13), (10, 26)])
def test_a_long_prompt_is_answered_as_in_chunks(runner, checkpoint, least, most):
    """With others beside it that begin, decode and are long themselves."""
    ids = load_golden(checkpoint)["input_ids"].tolist()
    requests = [
        request(ids[3:10], 30),
        request(ids, 12, prompt_logprobs=0),
        request(ids[7:36], 7, frequency_penalty=0.5),
        request(ids[20:25], 9),
    ]
    found, plans = heard(with_long(runner, least, most), requests)
    expected, _ = heard(runner, requests)
    assert_same(found, expected)
    assert any(plan.long and plan.chunks for plan in plans)


@pytest.mark.parametrize("num_deferred", [0, 1])
def test_with_experts_on_both_sides_it_is_the_same(runner, checkpoint, num_deferred):
    """Those of the host pass through the ring, once for the whole prompt. Deferred ones come a
    layer late, in a passage as in chunks."""
    if checkpoint.name not in ON_BOTH_SIDES:
        pytest.skip("others have the same parts")
    ids = load_golden(checkpoint)["input_ids"].tolist()
    requests = [request(ids[3:10], 30), request(ids, 12, prompt_logprobs=0)]
    passing = divided(checkpoint, runner, num_deferred, threshold=10)
    expected, _ = heard(runner, requests)
    if num_deferred:
        chunked = divided(checkpoint, runner, num_deferred, threshold=0)
        expected, _ = heard(chunked, requests)
        chunked.close()
    found, plans = heard(passing, requests)
    assert_same(found, expected)
    assert any(plan.long and plan.chunks for plan in plans)
    assert passing._model.bank.sides.ring.num_sent > 0
    passing.close()


def divided(checkpoint, like, num_deferred, *, threshold):
    """A quarter of the experts on a device, and a ring for the others."""
    drafting = like.capacity.num_drafts > 0
    return build_runner(
        RunnerConfig(
            ModelConfig(model=checkpoint, dtype="float32"),
            ExpertConfig(kt_cpuinfer=2),
            replace(ENGINE, speculative_algorithm="MTP" if drafting else None),
            DeviceConfig(device="cpu"),
            PlacementConfig(
                kt_gpu_experts_ratio=0.25,
                kt_gpu_prefill_token_threshold=threshold,
                kt_ring_experts=3,
                kt_max_deferred_experts_per_token=num_deferred,
            ),
        )
    )


def test_a_passage_makes_the_drafts_that_chunks_make(runner, checkpoint):
    if not runner.capacity.num_drafts:
        pytest.skip("this model makes none")
    ids = load_golden(checkpoint)["input_ids"].tolist()
    wanted = request(ids, 8)
    drafts = []
    for one in (runner, with_long(runner, 10, 26)):
        scheduler, made = Scheduler(one.capacity, ENGINE), []
        scheduler.submit(wanted)
        while (plan := scheduler.plan()) is not None:
            result = one.step(plan)
            made += [found.drafts for found in (*result.chunks, result.long) if found]
            scheduler.commit(plan, result)
        drafts.append([each for each in made if each])
    assert drafts[0] == drafts[1]
    assert len(drafts[0]) > 3


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_images_in_a_long_prompt_are_seen_as_in_chunks(num_drafts):
    """Cut in the middle by pieces and passages, and with another image in a step beside them."""
    engine = replace(
        ENGINE,
        speculative_algorithm="MTP" if num_drafts else None,
        speculative_num_draft_tokens=num_drafts or 1,
    )
    model = ModelConfig(model=FIXTURES / "qwen3_5_moe", dtype="float32")
    runner = build_runner(RunnerConfig(model, ExpertConfig(kt_cpuinfer=2), engine))
    ids = [*range(2, 9), *[250] * 8, *range(20, 26), *[250] * 15, *range(40, 47)]
    images = (image_input(7, 2, 4, token_side=8), image_input(21, 5, 3, token_side=8))
    requests = [
        replace(request([1, *[250] * 6, 5], 25), images=(image_input(1, 3, 2, token_side=8),)),
        replace(request(ids, 9, prompt_logprobs=0), images=images),
        replace(request(ids[2:], 9), images=tuple(replace(i, start=i.start - 2) for i in images)),
    ]
    expected, _ = heard(runner, requests)
    for least, most in ((43, 43), (10, 26)):
        found, _ = heard(with_long(runner, least, most), requests)
        assert_same(found, expected)
    unseen, _ = heard(with_long(runner, 10, 26), [replace(requests[1], images=())])
    assert (scores(unseen[0]) - scores(expected[1])).abs().max() > 1e-2
    runner.close()


@pytest.mark.parametrize("chats", CHATS, ids=lambda directory: directory.name)
def test_bfloat16_answers_are_those_of_transformers(chats):
    engine = replace(ENGINE, chunked_prefill_size=48, max_total_tokens=8000)
    model = ModelConfig(model=chats, dtype="bfloat16")
    runner = build_runner(RunnerConfig(model, ExpertConfig(kt_cpuinfer=2), engine))
    cases = json.loads((chats / "golden.json").read_text())
    asked = [request(case["prompt_ids"], len(case["answer_ids"]), logprobs=None) for case in cases]
    found, plans = heard(with_long(runner, 8, 100), asked)
    for case, events in zip(cases, found, strict=True):
        assert [event.token for event in events] == case["answer_ids"], case["name"]
    assert any(plan.long for plan in plans)
    runner.close()
