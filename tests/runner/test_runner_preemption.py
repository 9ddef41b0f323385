"""Scheduler and runner together, on a model of exact arithmetic: whatever little room there is,
a request gets the tokens and the scores that it gets alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kttrio.config import EngineConfig
from kttrio.engine.scheduler import Scheduler
from kttrio.plan import Capacity
from kttrio.request import FinishReason, GenerateRequest, SamplingParams
from kttrio.runner.runner import Runner
from tests.runner.toy import PAGE_SIZE, VOCAB, ToyModel

SAMPLINGS = (
    {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
    {"top_p": 0.9, "logprobs": 3, "seed": -5},
    {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 0},
    {"min_tokens": 9, "stop_token_ids": frozenset(range(0, 90, 2)), "top_k": 10**6},
    {"prompt_logprobs": 0, "frequency_penalty": 2.0, "min_p": 1.0, "seed": 2**63},
    {"logit_bias": tuple((i, -100.0) for i in range(VOCAB)), "temperature": 1e-6},
)


def run(requests, *, pages, budget, num_drafts=0, long_tokens=0):
    """Everything each request heard, and the scheduler with its counts."""
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
    runner = Runner(model, caches, capacity=capacity, device=torch.device("cpu"))
    scheduler = Scheduler(capacity, EngineConfig(chunked_prefill_size=budget))
    heard = {scheduler.submit(request): [] for request in requests}
    while (plan := scheduler.plan()) is not None:
        for sequence, event in scheduler.commit(plan, runner.step(plan)):
            heard[sequence].append(event)
    assert all(events[-1].finish for events in heard.values())
    return list(heard.values()), scheduler


def request(number, kind, num_prompt, max_tokens):
    prompt = tuple((7 * number + 13 * i) % 90 for i in range(num_prompt))
    sampling = {"seed": number, **SAMPLINGS[kind]}
    return GenerateRequest(str(number), prompt, SamplingParams(max_tokens, **sampling))


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


def test_the_room_is_little_indeed():
    requests = [request(number, number, 10, 20) for number in range(len(SAMPLINGS))]
    heard, scheduler = run(requests, pages=10, budget=5)
    assert scheduler.num_preemptions > 3
    assert {events[-1].finish for events in heard} <= {FinishReason.LENGTH, FinishReason.STOP}
    scored = heard[2]
    assert [len(event.prompt_logprobs or ()) for event in scored] == [10, *(0,) * 19]
