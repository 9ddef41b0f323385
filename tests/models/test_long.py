"""Long prompts through whole models of every family: layer by layer they get what chunks get."""

from __future__ import annotations

import itertools
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
from kttrio.experts import feeders
from kttrio.plan import Chunk, StepPlan
from kttrio.request import GenerateRequest, SamplingParams
from kttrio.runner.build import build_runner
from kttrio.runner.runner import Runner
from tests.device.shuffled import ShuffledDevice
from tests.experts.rings import AtOnce
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
    runner = build(checkpoint)
    yield runner
    runner.close()


def build(checkpoint, **placement):
    """With one draft in a step where the checkpoint has a layer for it; with experts on a device
    where there is something to place."""
    drafting = "mtp_logits" in load_golden(checkpoint)
    return build_runner(
        RunnerConfig(
            ModelConfig(model=checkpoint, dtype="float32"),
            ExpertConfig(kt_cpuinfer=2),
            replace(ENGINE, speculative_algorithm="MTP" if drafting else None),
            DeviceConfig(device="cpu" if placement else "auto"),
            PlacementConfig(**placement),
        )
    )


def divided(checkpoint, **placement):
    """A quarter of the experts on a device, and a ring for the others."""
    sizes = {"kt_gpu_experts_ratio": 0.25, "kt_ring_experts": 3}
    return build(checkpoint, **{"kt_gpu_prefill_token_threshold": 10, **sizes, **placement})


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


def heard(runner, requests, *, errors=False):
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
                assert errors or event.error is None
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


@pytest.mark.parametrize("name", ON_BOTH_SIDES)
def test_with_experts_on_both_sides_it_is_the_same(name):
    """Those of the host pass through the ring, once for the whole prompt."""
    assert_same(*heard_of(name, build, {}))


@pytest.mark.parametrize("name", ["deepseek_v32", "qwen3_next"])
def test_deferred_experts_come_a_layer_late_in_a_passage_too(name):
    deferred = {"kt_max_deferred_experts_per_token": 1}
    chunked = {"kt_gpu_prefill_token_threshold": 0, **deferred}
    found, expected = heard_of(name, divided, chunked, **deferred)
    assert_same(found, expected)
    (plain, _) = heard_of(name, build, {})
    assert (scores(found[1]) - scores(plain[1])).abs().max() > 1e-3


def heard_of(name, build_other, other, **placement):
    """Of a prompt that passes, and one that decodes beside it: with divided experts, and from
    another runner."""
    ids = load_golden(FIXTURES / name)["input_ids"].tolist()
    requests = [request(ids[3:10], 30), request(ids, 12, prompt_logprobs=0)]
    passing, plain = divided(FIXTURES / name, **placement), build_other(FIXTURES / name, **other)
    found, plans = heard(passing, requests)
    expected, _ = heard(plain, requests)
    assert any(plan.long and plan.chunks for plan in plans)
    assert passing._model.bank.sides.ring.num_sent > 0
    passing.close()
    plain.close()
    return found, expected


@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_the_device_shows(seed):
    """Copies are as late or early as events allow, while others decode between the units."""
    device = ShuffledDevice(seed)
    with (
        patch("kttrio.runner.build.open_device", lambda *_: device),
        patch("kttrio.experts.feeders.ThreadPoolExecutor", lambda *_, **__: AtOnce()),
        device.stirred(),
    ):
        name = ON_BOTH_SIDES[seed % len(ON_BOTH_SIDES)]
        assert_same(*heard_of(name, build, {}))


@pytest.mark.parametrize("number", [0, 3, 8])
def test_a_fault_on_the_way_of_experts_costs_the_long_prompt_only(number, caplog):
    """Whichever of them cannot be unpacked; what comes next is as if nothing had been."""
    runner = divided(FIXTURES / "qwen3_next")
    ids = load_golden(FIXTURES / "qwen3_next")["input_ids"].tolist()
    requests = [request(ids[3:10], 30), request(ids, 12)]
    expected, _ = heard(runner, requests)
    unpack, unpacked = feeders._Staging.unpack, itertools.count()

    def failing(staging, load):
        if next(unpacked) >= number:
            raise OSError("the memory is gone")
        unpack(staging, load)

    with patch.object(feeders._Staging, "unpack", failing):
        short, long = heard(runner, requests, errors=True)[0]
    assert_same([short], expected[:1])
    assert [event.error for event in long] == ["OSError: the memory is gone"]
    assert "a long prompt of 41 tokens failed" in caplog.text
    assert_same(heard(runner, requests)[0], expected)
    runner.close()


def test_a_runner_may_be_closed_in_mid_passage():
    runner = divided(FIXTURES / "qwen3_next")
    ids = load_golden(FIXTURES / "qwen3_next")["input_ids"].tolist()
    chunk = Chunk(0, 0, tuple(ids), tuple(range(11)), SamplingParams(1, seed=1), True, len(ids))
    ring = runner._model.bank.sides.ring
    with patch("kttrio.runner.passage._ALONE", 0.0):
        while not ring.is_busy:
            assert runner.step(StepPlan((), chunk)).long is None
    runner.close()
    assert not ring.is_busy


@pytest.mark.parametrize("name", ["deepseek_v32", "glm4_moe", "qwen3_5_moe", "qwen3_next"])
def test_a_passage_makes_the_drafts_that_chunks_make(name):
    runner = build(FIXTURES / name)
    ids = load_golden(FIXTURES / name)["input_ids"].tolist()
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
    runner.close()


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
