"""Scheduler and runner together, on a model of exact arithmetic: whatever little room there is,
whoever comes and goes, a request gets the tokens and the scores that it gets alone."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kttrio.config import EngineConfig
from kttrio.engine.scheduler import Scheduler
from kttrio.plan import Capacity
from kttrio.request import FinishReason, GenerateRequest, SamplingParams
from kttrio.runner import passage
from kttrio.runner.runner import Runner
from tests.fakes import RuledConstraint
from tests.runner.toy import PAGE_SIZE, VOCAB, ToyModel

SAMPLINGS = (
    {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
    {"top_p": 0.9, "logprobs": 3, "seed": -5},
    {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 0},
    {"min_tokens": 9, "stop_token_ids": frozenset(range(0, 90, 2)), "top_k": 10**6},
    {"prompt_logprobs": 0, "frequency_penalty": 2.0, "min_p": 1.0, "seed": 2**63},
    {"logit_bias": tuple((i, -100.0) for i in range(VOCAB)), "temperature": 1e-6},
    {"temperature": 0.0, "logprobs": 2},
    {"top_p": 0.9, "min_tokens": 99, "stop_token_ids": frozenset({5})},
)
RULES = {
    6: lambda outputs: [token for token in range(VOCAB) if (token + len(outputs)) % 7],
    7: lambda outputs: range(len(outputs) % 3, VOCAB, 3) if len(outputs) < 11 else [5],
}
"""What two of these may say."""


class Visit(NamedTuple):
    """When a request comes and goes, in steps."""

    kind: int
    num_prompt: int
    max_tokens: int
    arrives: int = 0
    leaves: int = 10**6


class Machine:
    """A scheduler and a runner; long prompts take a unit in each step."""

    def __init__(self, *, pages, budget, num_drafts=0, long_tokens=0):
        capacity = Capacity(
            num_slots=4,
            num_pages=pages,
            page_size=PAGE_SIZE,
            context_length=64,
            max_step_tokens=budget,
            vocab_size=VOCAB,
            num_drafts=num_drafts,
            long_tokens=long_tokens,
            max_long_tokens=3 * long_tokens,
        )
        model = ToyModel()
        caches = model.new_caches(num_pages=pages, page_size=PAGE_SIZE, num_slots=4)
        self.runner = Runner(model, caches, capacity=capacity, device=torch.device("cpu"))
        self.scheduler = Scheduler(capacity, EngineConfig(chunked_prefill_size=budget))

    def submit(self, asked):
        """As if for the first time."""
        if asked.constraint is not None:
            asked = replace(asked, constraint=asked.constraint.anew())
        return self.scheduler.submit(asked)

    def step(self):
        """The events of a step; None where there is nothing to do."""
        plan = self.scheduler.plan()
        if plan is None:
            return None
        with patch.object(passage, "_ALONE", 0.0), patch.object(passage, "_SHARE", 0.0):
            return self.scheduler.commit(plan, self.runner.step(plan))


def run(requests, **room):
    """Everything each request heard, and the scheduler with its counts."""
    machine = Machine(**room)
    heard = {machine.submit(request): [] for request in requests}
    while (events := machine.step()) is not None:
        for sequence, event in events:
            heard[sequence].append(event)
    assert all(events[-1].finish for events in heard.values())
    return list(heard.values()), machine.scheduler


def request(number, kind, num_prompt, max_tokens):
    prompt = tuple((7 * number + 13 * i) % 90 for i in range(num_prompt))
    sampling = {"seed": number, **SAMPLINGS[kind]}
    constraint = RuledConstraint(RULES[kind]) if kind in RULES else None
    params = SamplingParams(max_tokens, **sampling)
    return GenerateRequest(str(number), prompt, params, constraint=constraint)


def rounded(events):
    """The scores of a row may differ in the last bit with the number of rows beside it."""

    def pairs(found):
        return [(token, round(value, 4)) for token, value in found]

    def score(found):
        return found and (*pairs([found[:2]]), *pairs(found.top))

    return [
        (e.token, e.finish, score(e.logprob), [score(p) for p in e.prompt_logprobs or ()])
        for e in events
    ]


@settings(max_examples=60)
@given(
    kinds=st.lists(st.sampled_from(range(len(SAMPLINGS))), min_size=2, max_size=6),
    pages=st.integers(9, 14),
    budget=st.integers(3, 9),
    lengths=st.tuples(st.integers(1, 14), st.integers(12, 20)),
    num_drafts=st.integers(0, 4),
    long_tokens=st.sampled_from([0, 0, 2, 5]),
)
def test_neither_little_room_nor_drafts_nor_passages_change_what_is_heard(
    kinds, pages, budget, lengths, num_drafts, long_tokens
):
    requests = [
        request(number, kind, lengths[0] + number % 3, lengths[1])
        for number, kind in enumerate(kinds)
    ]
    crowded, _ = run(
        requests, pages=pages, budget=budget, num_drafts=num_drafts, long_tokens=long_tokens
    )
    for asked, events in zip(requests, crowded, strict=True):
        ((alone,), scheduler) = run([asked], pages=100, budget=64)
        assert scheduler.num_preemptions == 0
        assert rounded(events) == rounded(alone)


VISITS = st.builds(
    Visit,
    kind=st.sampled_from(range(len(SAMPLINGS))),
    num_prompt=st.integers(1, 9) | st.integers(10, 40),
    max_tokens=st.integers(1, 12),
    arrives=st.integers(0, 40),
    leaves=st.just(10**6) | st.integers(1, 90),
)


@settings(max_examples=60, deadline=None)
@given(
    visits=st.lists(VISITS, min_size=2, max_size=6),
    pages=st.integers(16, 24),
    budget=st.integers(3, 9),
    num_drafts=st.sampled_from([0, 0, 2]),
    long_tokens=st.sampled_from([2, 5, 12]),
)
def test_whoever_comes_and_goes_beside_it_changes_nothing(
    visits, pages, budget, num_drafts, long_tokens
):
    machine = Machine(pages=pages, budget=budget, num_drafts=num_drafts, long_tokens=long_tokens)
    requests = [request(i, v.kind, v.num_prompt, v.max_tokens) for i, v in enumerate(visits)]
    here, heard = {}, [[] for _ in visits]
    for step in range(5000):
        for number, visit in enumerate(visits):
            if visit.arrives == step:
                here[machine.submit(requests[number])] = number
            if visit.leaves == step and number in here.values():
                machine.scheduler.abort(next(s for s, n in here.items() if n == number))
        events = machine.step()
        if events is None and step > 40:
            break
        for sequence, event in events or ():
            heard[here[sequence]].append(event)
    assert machine.scheduler.is_empty
    for asked, visit, events in zip(requests, visits, heard, strict=True):
        ((alone,), _) = run([asked], pages=100, budget=64)
        assert rounded(events) == rounded(alone[: len(events)])
        assert len(events) == len(alone) or visit.leaves < 10**6


def test_the_room_is_little_indeed():
    requests = [request(number, number, 10, 20) for number in range(len(SAMPLINGS))]
    heard, scheduler = run(requests, pages=10, budget=5)
    assert scheduler.num_preemptions > 3
    assert {events[-1].finish for events in heard} <= {FinishReason.LENGTH, FinishReason.STOP}
    scored = heard[2]
    assert [len(event.prompt_logprobs or ()) for event in scored] == [10, *(0,) * 19]
