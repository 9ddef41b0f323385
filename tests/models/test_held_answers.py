"""Whole models whose answers are held: the best tokens of those that may come, also with drafts."""

from __future__ import annotations

import json

import pytest
import torch

from kttrio.config import EngineConfig, ExpertConfig, ModelConfig, RunnerConfig
from kttrio.engine.scheduler import Scheduler
from kttrio.models.loading import load_model
from kttrio.request import FinishReason, GenerateRequest, SamplingParams
from kttrio.runner.build import build_runner
from tests.fakes import RuledConstraint
from tests.golden import FIXTURES, PAGE_SIZE, Sequences

EXPERTS = ExpertConfig(kt_cpuinfer=2)
LENGTH = 24
END = 3


def many(outputs):
    """Two of three tokens; any of the vocabularies is smaller."""
    return [token for token in range(5000) if (token + len(outputs)) % 3]


def few_then_end(outputs):
    return range(len(outputs), 400, 40) if len(outputs) < 9 else [END]


@pytest.fixture(scope="module", params=["qwen3_next_chat", "deepseek_v3_chat"])
def checkpoint(request):
    return FIXTURES / request.param


@pytest.fixture(scope="module")
def prompts(checkpoint):
    cases = json.loads((checkpoint / "golden.json").read_text())
    return [tuple(case["prompt_ids"]) for case in cases[:2]]


@pytest.fixture(scope="module")
def expected(checkpoint, prompts):
    """Greedy, one after the other, by the model alone: what each rule leaves of each prompt."""
    model = load_model(checkpoint, dtype=torch.float32, experts=EXPERTS, max_step_tokens=1024)
    with torch.inference_mode():
        found = [
            [greedy(model, prompt, rule) for rule in (many, few_then_end)] for prompt in prompts
        ]
    model.close()
    return found


def greedy(model, prompt, rule):
    pages = -(-(len(prompt) + LENGTH) // PAGE_SIZE)
    sequence, outputs = Sequences(model, [list(prompt)], pages), ()
    logits = sequence.step([len(prompt)])[0]
    while len(outputs) < LENGTH and outputs[-1:] != (END,):
        allowed = torch.tensor([t for t in rule(outputs) if t < logits.shape[-1]])
        outputs = (*outputs, int(allowed[logits[-1, allowed].argmax()]))
        sequence.prompts[0].append(outputs[-1])
        logits = sequence.step([1])[0]
    return list(outputs)


def request(prompt, rule=None, **sampling):
    params = SamplingParams(
        **{"max_tokens": LENGTH, "seed": 1, "temperature": 0.0, "min_tokens": LENGTH, **sampling},
        stop_token_ids=frozenset({END}),
    )
    return GenerateRequest("r", prompt, params, constraint=rule and RuledConstraint(rule))


def answers_of(checkpoint, num_drafts, requests):
    engine = EngineConfig(
        chunked_prefill_size=64,
        max_running_requests=8,
        page_size=PAGE_SIZE,
        max_total_tokens=4000,
        speculative_algorithm="MTP" if num_drafts else None,
        speculative_num_draft_tokens=num_drafts or 1,
    )
    model = ModelConfig(model=checkpoint, dtype="float32")
    runner = build_runner(RunnerConfig(model, EXPERTS, engine))
    scheduler = Scheduler(runner.capacity, engine)
    heard = {scheduler.submit(request): [] for request in requests}
    while (plan := scheduler.plan()) is not None:
        for sequence, event in scheduler.commit(plan, runner.step(plan)):
            heard[sequence].append(event)
    runner.close()
    return list(heard.values()), scheduler


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_the_best_of_what_may_come_is_said_whoever_runs_beside_it(
    checkpoint, prompts, expected, num_drafts
):
    rules = (many, few_then_end, None)
    requests = [request(prompt, rule) for prompt in prompts for rule in rules]
    heard, scheduler = answers_of(checkpoint, num_drafts, requests)
    said = [[event.token for event in events] for events in heard]
    assert [said[0:2], said[3:5]] == expected
    assert [events[-1].finish for events in heard] == [
        FinishReason.LENGTH,
        FinishReason.STOP,
        FinishReason.LENGTH,
    ] * 2
    assert len({tuple(tokens) for tokens in said[0:3]}) == 3, "the rules matter"
    assert (scheduler.num_accepted > 0) == (num_drafts > 0)


def test_what_is_drawn_by_chance_is_drawn_alike_with_drafts(checkpoint, prompts):
    drawn = []
    for num_drafts in (0, 2):
        drawing = {"temperature": 0.8, "top_p": 0.9, "logprobs": 1}
        requests = [request(prompts[0], many, seed=seed, **drawing) for seed in range(4)]
        heard, _ = answers_of(checkpoint, num_drafts, requests)
        drawn.append([[event.token for event in events] for events in heard])
    assert drawn[0] == drawn[1]
    for tokens in drawn[0]:
        assert all(token in many(range(place)) for place, token in enumerate(tokens))
