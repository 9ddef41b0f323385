"""Scheduler and runner with drafts, on a model of exact arithmetic: more tokens in a step, and not
one that is another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kttrio.config import EngineConfig
from kttrio.engine.scheduler import Scheduler
from kttrio.plan import Capacity
from kttrio.request import FinishReason, GenerateRequest, SamplingParams
from kttrio.runner.runner import Runner
from tests.fakes import RuledConstraint
from tests.runner.toy import PAGE_SIZE, VOCAB, ToyModel

ALWAYS_RIGHT, ALWAYS_WRONG = 10**6, 1
GREEDY = {"temperature": 0.0}


class Machine:
    """A scheduler and a runner; `accepted` lists how many drafts stood, for each chunk with any."""

    def __init__(self, num_drafts, *, slips=3, pages=60, budget=64):
        capacity = Capacity(4, pages, PAGE_SIZE, 200, budget, VOCAB, num_drafts)
        self.model = ToyModel(slips)
        caches = self.model.new_caches(num_pages=pages, page_size=PAGE_SIZE, num_slots=4)
        self.runner = Runner(self.model, caches, capacity=capacity, device=torch.device("cpu"))
        self.scheduler = Scheduler(capacity, EngineConfig(chunked_prefill_size=budget))
        self.accepted, self.num_steps = [], 0

    def run(self, *requests):
        heard = {self.scheduler.submit(request): [] for request in requests}
        while (plan := self.scheduler.plan()) is not None:
            result = self.runner.step(plan)
            self.num_steps += 1
            for chunk, found in zip(plan.chunks, result.chunks, strict=True):
                if chunk.num_drafts:
                    self.accepted.append(len(found.tokens) - 1)
            for sequence, event in self.scheduler.commit(plan, result):
                heard[sequence].append(event)
        return list(heard.values())


def request(num_prompt=7, max_tokens=40, **sampling):
    prompt = tuple((5 + 13 * i) % 90 for i in range(num_prompt))
    return GenerateRequest("r", prompt, SamplingParams(max_tokens, **{"seed": 3, **sampling}))


def plainly(*requests):
    return Machine(0).run(*requests)


def tokens(events):
    return [event.token for event in events]


@pytest.mark.parametrize(("num_drafts", "slips"), [(1, 3), (2, 3), (4, 3), (8, 5)])
def test_every_number_of_accepted_drafts_gives_the_plain_answer(num_drafts, slips):
    machine = Machine(num_drafts, slips=slips)
    (events,) = machine.run(request(max_tokens=150, **GREEDY))
    (plain,) = plainly(request(max_tokens=150, **GREEDY))
    assert tokens(events) == tokens(plain)
    assert set(machine.accepted) == set(range(num_drafts + 1))


def test_steps_are_saved_as_far_as_drafts_stand():
    asked = request(max_tokens=41, **GREEDY)
    right, wrong = Machine(3, slips=ALWAYS_RIGHT), Machine(3, slips=ALWAYS_WRONG)
    assert tokens(*right.run(asked)) == tokens(*wrong.run(asked)) == tokens(*plainly(asked))
    assert right.num_steps == 1 + 40 // 4
    assert set(right.accepted) == {3}
    assert wrong.num_steps == 41
    assert set(wrong.accepted) == {0}


def test_events_and_counts_say_what_became_of_the_drafts():
    machine = Machine(2)
    (events,) = machine.run(request(**GREEDY))
    scheduler = machine.scheduler
    assert sum(event.accepted for event in events) == scheduler.num_accepted > 0
    rejected = sum(event.rejected for event in events)
    assert rejected == scheduler.num_drafted - scheduler.num_accepted > 0
    assert not events[0].accepted


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_the_length_is_kept_in_mid_run(max_tokens):
    (events,) = Machine(4, slips=ALWAYS_RIGHT).run(request(max_tokens=max_tokens, **GREEDY))
    assert len(events) == max_tokens
    assert events[-1].finish is FinishReason.LENGTH


def test_no_draft_is_computed_that_could_not_become_a_token():
    machine = Machine(4, slips=ALWAYS_RIGHT)
    (events,) = machine.run(request(max_tokens=8, **GREEDY))
    # One token after the prompt; five; then two: one draft and the token after it.
    assert machine.accepted == [4, 1]
    assert sum(event.rejected for event in events) == 0


@pytest.mark.parametrize("place", range(1, 9))
def test_a_stop_token_ends_it_in_mid_run(place):
    (plain,) = plainly(request(max_tokens=12, **GREEDY))
    stop = {"stop_token_ids": frozenset([plain[place].token]), **GREEDY}
    first = tokens(plain).index(plain[place].token)
    machine = Machine(4, slips=ALWAYS_RIGHT)
    (events,) = machine.run(request(max_tokens=12, **stop))
    assert tokens(events) == tokens(plain[: first + 1])
    assert events[-1].finish is FinishReason.STOP
    assert machine.scheduler.num_free_pages == machine.scheduler.num_pages


def test_min_tokens_count_within_a_run():
    (plain,) = plainly(request(max_tokens=12, **GREEDY))
    stop = {"stop_token_ids": frozenset(tokens(plain[:3])), "min_tokens": 6, **GREEDY}
    (events,) = Machine(4, slips=ALWAYS_RIGHT).run(request(**stop))
    assert tokens(events) == tokens(*plainly(request(**stop)))
    assert len(events) >= 6


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.3},
        {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
        {"temperature": 0.5, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.7},
        {"temperature": 0.4, "logit_bias": ((7, 6.0), (9, -6.0)), "min_p": 0.05},
    ],
    ids=lambda sampling: "+".join(sampling),
)
def test_what_is_drawn_by_chance_is_drawn_alike(sampling):
    """Some drafts are accepted at any temperature, and each place has its own random number."""
    requests = [request(max_tokens=80, **{**sampling, "seed": seed}) for seed in range(4)]
    machine = Machine(3, slips=ALWAYS_RIGHT, pages=100)
    heard, plain = machine.run(*requests), plainly(*requests)
    assert list(map(tokens, heard)) == list(map(tokens, plain))
    assert {0, 1} <= set(machine.accepted)


def test_every_token_has_its_own_log_probability():
    asked = request(**GREEDY, logprobs=3)
    machine = Machine(4)
    (events,), (plain,) = machine.run(asked), plainly(asked)
    for event, expected in zip(events, plain, strict=True):
        assert event.logprob.token == event.token
        assert event.logprob.logprob == pytest.approx(expected.logprob.logprob, abs=1e-5)
        assert [t for t, _ in event.logprob.top] == [t for t, _ in expected.logprob.top]


def test_a_prompt_in_pieces_beside_others_that_verify():
    requests = [request(num_prompt, **GREEDY) for num_prompt in (3, 70, 1, 33)]
    machine = Machine(2, budget=12)
    assert list(map(tokens, machine.run(*requests))) == [
        tokens(*plainly(asked)) for asked in requests
    ]


def test_a_step_that_fails_while_it_drafts_spoils_nothing_else():
    """The slots and pages that it leaves behind, states unsettled, are as good as any."""
    machine = Machine(3)
    for _ in range(4):
        machine.scheduler.submit(request(**GREEDY))
    for _ in range(5):
        plan = machine.scheduler.plan()
        machine.scheduler.commit(plan, machine.runner.step(plan))
    plan = machine.scheduler.plan()
    machine.model.draft, draft = None, machine.model.draft
    with pytest.raises(TypeError):
        machine.runner.step(plan)
    machine.model.draft = draft
    assert len(machine.scheduler.fail(plan, "boom")) == 4
    assert tokens(*machine.run(request(**GREEDY))) == tokens(*plainly(request(**GREEDY)))


def test_a_sequence_that_breaks_in_mid_run_ends_alone():
    machine = Machine(2, slips=ALWAYS_RIGHT)
    bias = {"logit_bias": ((ToyModel.broken, 1000.0),), "temperature": 0.0}
    broken, sound = machine.run(request(**bias), request(**GREEDY))
    assert broken[-1].finish is FinishReason.ERROR
    assert "not finite" in broken[-1].error
    assert tokens(sound) == tokens(*plainly(request(**GREEDY)))


def held(asked, rule):
    return replace(asked, constraint=RuledConstraint(rule))


def most_tokens(outputs):
    return [token for token in range(VOCAB) if (token + len(outputs)) % 6]


@pytest.mark.parametrize("sampling", [GREEDY, {"temperature": 0.1, "top_p": 0.95}])
def test_masks_are_kept_behind_drafts_as_without(sampling):
    """The drafts know nothing of them, and some that would be right are forbidden."""
    asked = request(max_tokens=120, **sampling)
    machine = Machine(3, slips=ALWAYS_RIGHT)
    (events,), (plain,) = machine.run(held(asked, most_tokens)), plainly(held(asked, most_tokens))
    assert tokens(events) == tokens(plain)
    assert all(token in most_tokens(range(i)) for i, token in enumerate(tokens(events)))
    assert tokens(events) != tokens(*plainly(asked))
    assert len(set(machine.accepted)) >= 3


def test_a_form_that_ends_in_mid_run_ends_the_sequence():
    (free,) = plainly(request(**GREEDY))
    said, end = tokens(free)[:5], 96

    def rule(outputs):
        return [said[len(outputs)]] if len(outputs) < 5 else [end]

    asked = request(stop_token_ids=frozenset({end}), min_tokens=30, **GREEDY)
    (events,) = Machine(4, slips=ALWAYS_RIGHT).run(held(asked, rule))
    assert tokens(events) == [*said, end]
    assert events[-1].finish is FinishReason.STOP
