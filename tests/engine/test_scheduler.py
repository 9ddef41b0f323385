"""The scheduler alone: no trio, no thread; the scripted runner checks every plan."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kttrio.config import ConfigError, EngineConfig
from kttrio.engine.errors import QueueFull, RequestTooLarge
from kttrio.engine.scheduler import Scheduler
from kttrio.engine.sequence import Sequence, Stage
from kttrio.plan import Chunk, ChunkResult, StepPlan
from kttrio.request import FinishReason, GenerateRequest, SamplingParams, TokenEvent
from tests.fakes import (
    MadeMasks,
    PlanError,
    RuledConstraint,
    ScriptedRunner,
    capacity,
    scripted_logprob,
    scripted_token,
)


def request(prompt, max_tokens=4, **sampling) -> GenerateRequest:
    ids = tuple(range(1, prompt + 1)) if isinstance(prompt, int) else tuple(prompt)
    return GenerateRequest("r", ids, SamplingParams(max_tokens=max_tokens, seed=0, **sampling))


def constrained(wanted: GenerateRequest, rule) -> GenerateRequest:
    return replace(wanted, constraint=RuledConstraint(rule))


def most_tokens(outputs):
    """Four of five tokens, others at each place."""
    return [token for token in range(1000) if (token + len(outputs)) % 5]


def two_then_end(outputs):
    """Two even tokens, then the end token and nothing else."""
    return range(0, 1000, 2) if len(outputs) < 2 else [END]


END = 999


class Bench:
    """A scheduler with its runner; `step` runs one step and files the events."""

    def __init__(self, *, config=None, **limits):
        self.runner = ScriptedRunner(capacity(**limits))
        self.scheduler = Scheduler(self.runner.capacity, config or EngineConfig())
        self.events: dict[Sequence, list[TokenEvent]] = {}
        self.sequences: list[Sequence] = []

    def submit(self, wanted: GenerateRequest) -> Sequence:
        self.sequences.append(self.scheduler.submit(wanted))
        return self.sequences[-1]

    def step(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        if plan is not None:
            for sequence, event in self.scheduler.commit(plan, self.runner.step(plan)):
                self.events.setdefault(sequence, []).append(event)
        return plan

    def run(self, max_steps=10_000) -> int:
        for number in range(max_steps):
            if self.step() is None:
                return number
        raise AssertionError("does not come to an end")

    def tokens(self, sequence) -> list[int | None]:
        return [event.token for event in self.events.get(sequence, [])]

    def assert_all_free(self):
        scheduler = self.scheduler
        assert scheduler.is_empty
        assert scheduler.num_free_pages == scheduler.num_pages
        assert scheduler.num_free_slots == scheduler.num_slots


def crowded(**limits) -> Bench:
    """Two sequences that together need 8 of 6 pages: the second is preempted on the way."""
    bench = Bench(num_slots=4, num_pages=6, page_size=4, **limits)
    for start in (100, 200):
        bench.submit(request(range(start, start + 4), 12))
    return bench


def preempt(bench: Bench) -> None:
    """Run steps until one has been preempted; no step is in flight then."""
    for _ in range(100):
        if bench.scheduler.num_preemptions:
            return
        bench.step()
    raise AssertionError("nothing was preempted")


def expected(prompt: tuple[int, ...], count: int) -> list[int]:
    return [scripted_token(prompt, i) for i in range(count)]


def lawful(prompt: tuple[int, ...], count: int, rule) -> list[int]:
    """The script's tokens where the rule has them, else the lowest that it has."""
    outputs: tuple[int, ...] = ()
    for token in expected(prompt, count):
        allowed = rule(outputs)
        outputs = (*outputs, token if token in allowed else min(allowed))
    return list(outputs)


def lengths(plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return [len(chunk.token_ids) for chunk in plan.chunks]


def test_one_request_from_prompt_to_length():
    bench = Bench()
    sequence = bench.scheduler.submit(request(20, 5))
    bench.run()
    assert bench.tokens(sequence) == expected(sequence.request.prompt_ids, 5)
    finishes = [event.finish for event in bench.events[sequence]]
    assert finishes == [None] * 4 + [FinishReason.LENGTH]
    bench.assert_all_free()


def test_long_prompt_is_cut_and_decodes_run_in_every_step():
    bench = Bench(config=EngineConfig(chunked_prefill_size=8))
    first = bench.scheduler.submit(request(4, 20))
    bench.step()
    bench.scheduler.submit(request(range(100, 130), 2))
    assert [lengths(bench.step()) for _ in range(5)] == [[1, 7], [1, 7], [1, 7], [1, 7], [1, 2]]
    assert len(bench.tokens(first)) == 6


def test_several_prompts_share_a_step_in_order_of_arrival():
    bench = Bench(config=EngineConfig(chunked_prefill_size=10))
    for start in (0, 100, 200):
        bench.scheduler.submit(request(range(start, start + 4), 1))
    plan = bench.step()
    assert lengths(plan) == [4, 4, 2]
    assert plan is not None
    assert [chunk.token_ids[0] for chunk in plan.chunks] == [0, 100, 200]
    assert [chunk.sample for chunk in plan.chunks] == [True, True, False]


def test_step_of_the_runner_bounds_the_budget():
    bench = Bench(max_step_tokens=6, config=EngineConfig(chunked_prefill_size=1000))
    bench.scheduler.submit(request(20))
    assert lengths(bench.step()) == [6]


def test_no_more_sequences_run_than_a_step_has_tokens():
    bench = Bench(num_slots=8, config=EngineConfig(chunked_prefill_size=3))
    sequences = [bench.scheduler.submit(request((n, n + 1), 5)) for n in range(8)]
    assert bench.scheduler.num_slots == 3
    bench.run()
    for sequence in sequences:
        assert bench.tokens(sequence) == expected(sequence.request.prompt_ids, 5)
    bench.assert_all_free()


@pytest.mark.parametrize("setting", ["chunked_prefill_size", "max_running_requests"])
def test_settings_under_which_nothing_runs_are_refused(setting):
    with pytest.raises(ConfigError, match=f"--{setting.replace('_', '-')} 0"):
        Scheduler(capacity(), EngineConfig(**{setting: 0}))


def test_slots_bound_admission():
    bench = Bench(num_slots=2)
    for n in range(3):
        bench.scheduler.submit(request((n,), 2))
    assert len(lengths(bench.step())) == 2
    assert bench.scheduler.num_waiting == 1
    bench.run()
    bench.assert_all_free()


def test_pages_bound_admission_and_the_head_holds_back_the_rest():
    bench = Bench(num_pages=4, page_size=4)
    running = bench.scheduler.submit(request(8, 5))  # 3 pages
    bench.step()
    large = bench.scheduler.submit(request(8, 1))  # 2 pages, 1 free
    small = bench.scheduler.submit(request((1,), 1))  # would fit, but came later
    bench.step()
    assert bench.scheduler.num_waiting == 2
    bench.run()
    assert list(bench.events) == [running, large, small]
    bench.assert_all_free()


def test_prompt_beyond_the_context_is_refused_with_the_numbers():
    scheduler = Bench(context_length=32).scheduler
    with pytest.raises(RequestTooLarge, match="33 tokens and the context length is 32"):
        scheduler.submit(request(33, 0))
    with pytest.raises(RequestTooLarge, match="32 tokens and the context length is 32"):
        scheduler.submit(request(32, 1))
    scheduler.submit(request(32, 0))
    scheduler.submit(request(31, 1))


def test_prompt_beyond_all_pages_is_refused_with_the_numbers():
    scheduler = Bench(num_pages=4, page_size=4).scheduler
    assert scheduler.longest_sequence == 16
    with pytest.raises(RequestTooLarge, match=r"16 tokens and the KV cache holds 16.*--max-total-"):
        scheduler.submit(request(16, 1))
    with pytest.raises(RequestTooLarge, match="17 tokens"):
        scheduler.submit(request(17, 0))
    scheduler.submit(request(16, 0))
    scheduler.submit(request(15, 1))


def test_request_alone_that_fills_the_pool_ends_with_length():
    bench = Bench(num_pages=4, page_size=4)
    sequence = bench.scheduler.submit(request(10, 1_000_000))
    bench.run()
    assert bench.tokens(sequence) == expected(sequence.request.prompt_ids, 6)
    assert bench.events[sequence][-1].finish is FinishReason.LENGTH
    assert bench.scheduler.num_preemptions == 0
    bench.assert_all_free()


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        Bench().scheduler.submit(request(()))


def test_max_tokens_is_cut_at_the_context_length():
    bench = Bench(context_length=32)
    sequence = bench.scheduler.submit(request(30, 100))
    bench.run()
    assert len(bench.tokens(sequence)) == 2
    assert bench.events[sequence][-1].finish is FinishReason.LENGTH
    bench.assert_all_free()


def test_queue_is_bounded_and_says_when_to_come_back():
    bench = Bench(num_slots=1, config=EngineConfig(max_queued_requests=2))
    bench.scheduler.submit(request(2, 50))
    bench.step()
    bench.scheduler.submit(request(2))
    bench.scheduler.submit(request(2))
    with pytest.raises(QueueFull, match="--max-queued-requests is 2") as full:
        bench.scheduler.submit(request(2))
    assert 1.0 <= full.value.retry_after <= 30.0
    assert bench.scheduler.num_waiting == 2


def test_without_a_queue_what_fits_at_once_is_taken():
    bench = Bench(num_slots=3, config=EngineConfig(max_queued_requests=0))
    for _ in range(3):
        bench.scheduler.submit(request(2))
    with pytest.raises(QueueFull):
        bench.scheduler.submit(request(2))


def test_preempted_ones_take_no_place_in_the_queue():
    bench = crowded(config=EngineConfig(max_queued_requests=1))
    preempt(bench)
    assert bench.scheduler.num_waiting == 1
    newcomer = bench.scheduler.submit(request(2))
    with pytest.raises(QueueFull, match="--max-queued-requests is 1"):
        bench.scheduler.submit(request(2))
    bench.run()
    assert bench.tokens(newcomer) == expected((1, 2), 4)
    bench.assert_all_free()


def test_without_a_queue_the_preempted_keep_their_slots():
    bench = crowded(config=EngineConfig(max_queued_requests=0))
    preempt(bench)
    bench.scheduler.abort(bench.sequences[0])  # now one is preempted and four slots are free
    for _ in range(3):
        bench.scheduler.submit(request(2))
    with pytest.raises(QueueFull):
        bench.scheduler.submit(request(2))
    bench.run()
    bench.assert_all_free()


def test_without_a_queue_missing_pages_refuse():
    bench = Bench(num_pages=2, page_size=4, config=EngineConfig(max_queued_requests=0))
    bench.scheduler.submit(request(7, 1))
    bench.step()
    bench.scheduler.submit(request(7, 1))
    bench.scheduler.plan()
    with pytest.raises(QueueFull):
        bench.scheduler.submit(request(2, 1))


def test_stop_token_ends_at_once():
    bench = Bench()
    stop = scripted_token((1, 2), 3)
    sequence = bench.scheduler.submit(request((1, 2), 50, stop_token_ids=frozenset({stop})))
    bench.run()
    assert bench.tokens(sequence) == expected((1, 2), 4)
    assert bench.events[sequence][-1].finish is FinishReason.STOP
    bench.assert_all_free()


def test_scoring_a_prompt_in_pieces():
    bench = Bench(config=EngineConfig(chunked_prefill_size=3))
    sequence = bench.scheduler.submit(request(10, 0, prompt_logprobs=1))
    bench.run()
    (event,) = bench.events[sequence]
    assert (event.token, event.finish) == (None, FinishReason.LENGTH)
    assert event.prompt_logprobs is not None
    assert event.prompt_logprobs[0] is None
    scores = [score.logprob for score in event.prompt_logprobs[1:] if score is not None]
    assert scores == [scripted_logprob(token) for token in range(2, 11)]
    bench.assert_all_free()


def test_waiting_sequence_leaves_the_queue_at_once():
    bench = Bench(num_slots=1)
    bench.scheduler.submit(request(2, 9))
    bench.step()
    waiting = bench.scheduler.submit(request(2))
    bench.scheduler.abort(waiting)
    assert bench.scheduler.num_waiting == 0
    bench.scheduler.abort(waiting)
    bench.run()
    assert waiting not in bench.events
    bench.assert_all_free()


def test_abort_in_flight_gives_back_at_commit():
    bench = Bench()
    sequence = bench.scheduler.submit(request(20, 9))
    plan = bench.scheduler.plan()
    assert plan is not None
    bench.scheduler.abort(sequence)
    assert bench.scheduler.num_free_pages < bench.scheduler.num_pages
    assert bench.scheduler.commit(plan, bench.runner.step(plan)) == []
    bench.assert_all_free()


def test_abort_between_steps_gives_back_at_once():
    bench = Bench()
    sequence = bench.scheduler.submit(request(20, 9))
    bench.step()
    bench.scheduler.abort(sequence)
    bench.assert_all_free()
    assert bench.scheduler.plan() is None


def test_failed_step_ends_only_its_own_sequences():
    bench = Bench(config=EngineConfig(chunked_prefill_size=4))
    failed = bench.scheduler.submit(request(4, 2))
    abandoned = bench.scheduler.submit(request(1, 2))
    plan = bench.scheduler.plan()
    assert plan is not None
    bench.scheduler.abort(abandoned)
    events = bench.scheduler.fail(plan, "boom")
    assert events == [(failed, TokenEvent(None, FinishReason.ERROR, error="boom"))]
    later = bench.scheduler.submit(request(3, 2))
    bench.run()
    assert bench.tokens(later) == expected((1, 2, 3), 2)
    bench.assert_all_free()


def test_failed_step_spares_the_preempted():
    bench = crowded()
    old, young = bench.sequences
    preempt(bench)
    plan = bench.scheduler.plan()
    assert plan is not None
    events = bench.scheduler.fail(plan, "boom")
    assert [sequence for sequence, _ in events] == [old]
    bench.run()
    assert bench.tokens(young) == expected(young.request.prompt_ids, 12)
    bench.assert_all_free()


def test_second_plan_in_flight_is_an_error():
    bench = Bench()
    bench.scheduler.submit(request(2))
    bench.scheduler.plan()
    with pytest.raises(RuntimeError, match="in flight"):
        bench.scheduler.plan()


def test_foreign_plan_is_an_error():
    bench = Bench()
    bench.scheduler.submit(request(2))
    bench.scheduler.plan()
    with pytest.raises(RuntimeError, match="not the one in flight"):
        bench.scheduler.fail(StepPlan(()), "boom")


def test_clear_drops_the_preempted_too():
    bench = crowded()
    preempt(bench)
    bench.scheduler.clear()
    bench.assert_all_free()
    bench.scheduler.abort(bench.sequences[1])
    assert bench.scheduler.plan() is None


def test_clear_drops_everything():
    bench = Bench(num_slots=2)
    for _ in range(4):
        bench.scheduler.submit(request(3))
    bench.step()
    bench.scheduler.plan()
    bench.scheduler.clear()
    bench.assert_all_free()


def test_pages_are_taken_on_demand():
    bench = Bench(num_pages=8, page_size=4)
    bench.scheduler.submit(request(4, 9))
    held = []
    while bench.step() is not None:
        held.append(8 - bench.scheduler.num_free_pages)
    assert held == [1, 2, 2, 2, 2, 3, 3, 3, 0]


def test_four_requests_without_limit_run_together():
    config = EngineConfig(max_running_requests=4)
    bench = Bench(num_slots=4, num_pages=16_000, context_length=262_144, config=config)
    for n in range(4):
        bench.submit(request(range(n, n + 50), 262_144 - 50))
    for _ in range(100):
        bench.step()
    assert lengths(bench.step()) == [1, 1, 1, 1]
    assert [s.max_outputs for s in bench.sequences] == [256_000 - 50] * 4
    assert bench.scheduler.num_preemptions == 0
    for sequence in bench.sequences:
        assert bench.tokens(sequence) == expected(sequence.request.prompt_ids, 101)


def test_requests_without_limit_all_fill_the_context_in_the_end():
    bench = Bench(num_slots=4, num_pages=16, page_size=4, context_length=64)
    for n in range(6):
        bench.submit(request(range(n, n + 5), 1000))
    bench.run(max_steps=6 * 64)
    for sequence in bench.sequences:
        assert bench.tokens(sequence) == expected(sequence.request.prompt_ids, 59)
        assert bench.events[sequence][-1].finish is FinishReason.LENGTH
    assert bench.scheduler.num_preemptions >= 3
    bench.assert_all_free()


def test_youngest_is_preempted_and_computed_again_from_the_start():
    bench = crowded()
    old, young = bench.sequences
    preempt(bench)
    assert (old.stage, young.stage) == (Stage.RUNNING, Stage.PREEMPTED)
    assert (young.slot, young.pages, bench.scheduler.num_free_slots) == (-1, (), 3)
    outputs = bench.tokens(young)
    assert len(outputs) == 9
    while young.stage is Stage.PREEMPTED:
        plan = bench.step()
    assert plan is not None
    chunk = plan.chunks[-1]
    assert (chunk.start, chunk.num_prompt_tokens, chunk.sample) == (0, 4, True)
    assert chunk.token_ids == (200, 201, 202, 203, *outputs)
    bench.run()
    for sequence in (old, young):
        assert bench.tokens(sequence) == expected(sequence.request.prompt_ids, 12)
    assert bench.scheduler.num_preemptions == 1
    bench.assert_all_free()


def test_recomputed_tokens_keep_to_the_budget():
    bench = crowded(config=EngineConfig(chunked_prefill_size=6))
    _, young = bench.sequences
    preempt(bench)
    bench.scheduler.abort(bench.sequences[0])
    assert [lengths(bench.step()) for _ in range(3)] == [[6], [6], [1]]
    samples = [plan.chunks[0].sample for plan in list(bench.runner.history)[-3:]]
    assert samples == [False, True, True]
    bench.run()
    assert bench.tokens(young) == expected(young.request.prompt_ids, 12)


def test_preempted_ones_run_again_in_order_of_arrival():
    bench = crowded()
    old, middle = bench.sequences
    young = bench.submit(request(range(300, 304), 12))
    while bench.scheduler.num_preemptions < 2:
        bench.step()
    assert [s.stage for s in (middle, young)] == [Stage.PREEMPTED] * 2
    while old.stage is Stage.RUNNING:
        bench.step()
    bench.step()
    assert (middle.stage, young.stage) == (Stage.RUNNING, Stage.PREEMPTED)
    bench.run()
    for sequence in bench.sequences:
        assert bench.tokens(sequence) == expected(sequence.request.prompt_ids, 12)


def test_preempted_goes_before_those_who_wait():
    bench = crowded()
    late = bench.submit(request((7,), 1))
    preempt(bench)
    while bench.scheduler.num_waiting:
        bench.step()
        assert late.stage is not Stage.RUNNING or bench.sequences[1].stage is not Stage.PREEMPTED
    bench.run()
    assert bench.tokens(late) == expected((7,), 1)


def test_newcomer_waits_until_all_have_pages_to_grow_into():
    bench = Bench(num_pages=5, page_size=4)
    bench.submit(request(8, 9))
    bench.step()
    newcomer = bench.submit(request(range(50, 58), 9))  # 2 pages and 1 to grow; the first wants 2
    bench.step()
    assert bench.scheduler.num_free_pages == 2
    assert newcomer.stage is Stage.WAITING
    bench.run()
    assert bench.scheduler.num_preemptions == 0


def test_long_newcomer_waits_for_more_room_than_a_short_one():
    """Of a prompt of 640 tokens the 32nd part must be free for each: 20 tokens, not a page's 4."""
    bench = Bench(num_pages=170, page_size=4, max_step_tokens=2000)
    bench.submit(request(4, 100))
    bench.step()
    long = bench.submit(request(640, 100))  # 160 pages and 5 to grow; the first holds 1, wants 5+1
    bench.step()
    assert long.stage is Stage.WAITING
    roomy = Bench(num_pages=173, page_size=4, max_step_tokens=2000)
    roomy.submit(request(4, 100))
    roomy.step()
    long = roomy.submit(request(640, 100))
    roomy.step()
    assert long.stage is Stage.RUNNING


def test_preemption_in_mid_prompt_scores_it_anew_and_once():
    bench = Bench(num_pages=9, page_size=4, config=EngineConfig(chunked_prefill_size=2))
    first = bench.submit(request(4, 30))
    while not bench.tokens(first):
        bench.step()
    second = bench.submit(request(range(50, 70), 9, prompt_logprobs=0))
    preempt(bench)
    assert second.stage is Stage.PREEMPTED
    assert bench.tokens(second) == []
    bench.run()
    scores = [event.prompt_logprobs for event in bench.events[second]]
    assert scores[0] is not None
    assert [score.token for score in scores[0] if score] == list(range(51, 70))
    assert scores[1:] == [None] * 8
    assert bench.tokens(second) == expected(tuple(range(50, 70)), 9)
    bench.assert_all_free()


def test_scores_delivered_before_a_preemption_are_not_computed_again():
    bench = Bench(num_pages=6, page_size=4)
    for start in (100, 200):
        bench.submit(request(range(start, start + 4), 12, prompt_logprobs=0))
    bench.run()
    assert bench.scheduler.num_preemptions == 1
    for sequence in bench.sequences:
        scored = [event.prompt_logprobs is not None for event in bench.events[sequence]]
        assert scored == [True] + [False] * 11
    again = [plan.chunks[-1] for plan in bench.runner.history if plan.chunks[-1].start == 0][-1]
    assert (len(again.token_ids), again.sampling.prompt_logprobs) == (13, None)


def test_preempted_sequence_leaves_the_queue_at_once():
    bench = crowded()
    old, young = bench.sequences
    preempt(bench)
    bench.scheduler.abort(young)
    assert bench.scheduler.num_waiting == 0
    bench.scheduler.abort(young)
    seen = len(bench.events[young])
    bench.run()
    assert len(bench.events[young]) == seen
    assert bench.tokens(old) == expected(old.request.prompt_ids, 12)
    bench.assert_all_free()


def test_drafts_share_what_the_budget_leaves():
    """Six of ten tokens go to the running, one for each; the other four to drafts."""
    config = EngineConfig(chunked_prefill_size=10)
    bench = Bench(num_slots=6, num_drafts=3, config=config)
    for start in range(6):
        bench.submit(request((100 + start,), 30))
    for _ in range(8):
        plan = bench.step()
    assert [chunk.num_drafts for chunk in plan.chunks] == [3, 1, 0, 0, 0, 0]
    bench.run()
    bench.assert_all_free()
    assert bench.scheduler.num_accepted > 0


@pytest.mark.parametrize("salt", range(6))
def test_nobody_is_preempted_for_drafts(salt):
    """The two never need ten pages at once, but take one ahead where it is free."""
    bench = Bench(num_slots=2, num_pages=9, page_size=4, num_drafts=3)
    for start in (100 + salt, 200 + salt):
        bench.submit(request(range(start, start + 4), 14))  # 17 tokens that are fed: 5 pages
    bench.run()
    assert bench.scheduler.num_preemptions == 0
    assert bench.scheduler.num_drafted > 0
    bench.assert_all_free()


def with_passage(**limits) -> Bench:
    """Prompts that lack 20 tokens pass, at most 30 at a time, in 3 steps each."""
    config = limits.pop("config", EngineConfig(chunked_prefill_size=8))
    return Bench(**{"long_tokens": 20, "max_long_tokens": 30, "config": config, **limits})


def long_of(bench: Bench) -> tuple[int, int] | None:
    """Where the long piece of the next step begins, and its length."""
    plan = bench.step()
    assert plan is not None
    return plan.long and (plan.long.start, len(plan.long.token_ids))


def test_a_long_prompt_passes_beside_the_steps():
    bench = with_passage()
    first = bench.submit(request(4, 20))
    bench.step()
    long = bench.submit(request(range(100, 125), 2))
    plans = [bench.step() for _ in range(3)]
    assert [lengths(plan) for plan in plans] == [[1], [1], [1]], "it takes nothing of the budget"
    assert len({id(plan.long) for plan in plans if plan}) == 1
    assert lengths(bench.step()) == [1, 1]
    bench.run()
    for sequence in (first, long):
        tokens = bench.tokens(sequence)
        assert tokens == expected(sequence.request.prompt_ids, len(tokens))
    bench.assert_all_free()


def test_a_step_may_have_nothing_but_a_passage():
    bench = with_passage()
    sequence = bench.submit(request(25, 1))
    plan = bench.step()
    assert plan is not None
    assert plan.chunks == ()
    assert plan.long is not None
    assert plan.long.sample
    bench.run()
    assert bench.tokens(sequence) == expected(sequence.request.prompt_ids, 1)
    bench.assert_all_free()


def test_a_prompt_of_several_passages_ends_with_an_ordinary_chunk():
    bench = with_passage()
    sequence = bench.submit(request(85, 1))
    places = [long_of(bench) for _ in range(7)]
    assert places == [(0, 30)] * 3 + [(30, 30)] * 3 + [(60, 25)], "the last one is long enough"
    bench.run()
    assert bench.tokens(sequence) == expected(sequence.request.prompt_ids, 1)
    shorter = with_passage()
    shorter.submit(request(45, 1))
    assert [long_of(shorter) for _ in range(4)] == [(0, 30)] * 3 + [None]
    assert [len(plan.chunks) for plan in shorter.runner.history] == [0, 0, 0, 1]


def test_there_is_one_passage_and_who_came_first_has_it_to_the_end():
    bench = with_passage()
    old, young = (bench.submit(request(range(start, start + 55), 1)) for start in (100, 200))
    short = bench.submit(request(3, 1))
    bench.run()
    assert list(bench.events) == [short, old, young]
    passed = [plan.long.token_ids[0] for plan in bench.runner.history if plan.long]
    assert passed == [100] * 3 + [130] * 3 + [200] * 3 + [230] * 3
    bench.assert_all_free()


def test_the_passage_goes_where_the_budget_is_used_up():
    bench = with_passage(config=EngineConfig(chunked_prefill_size=2))
    for start in (100, 200):
        bench.submit(request((start,), 30))
    bench.step()
    long = bench.submit(request(range(300, 325), 1))
    bench.run()
    assert bench.tokens(long) == expected(long.request.prompt_ids, 1)


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_a_single_token_is_no_passage_whatever_the_threshold(num_drafts):
    """It is what decoding computes: the sequence would be in a step twice."""
    bench = with_passage(long_tokens=1, num_drafts=num_drafts)
    single, longer = bench.submit(request((7,), 3)), bench.submit(request(31, 3))
    places = [long_of(bench) for _ in range(3)]
    assert places == [(0, 30)] * 3
    bench.run()
    for sequence in (single, longer):
        assert bench.tokens(sequence) == expected(sequence.request.prompt_ids, 3)
    bench.assert_all_free()


def test_a_scored_prompt_may_be_long():
    bench = with_passage()
    sequence = bench.submit(request(47, 0, prompt_logprobs=1))
    bench.run()
    (event,) = bench.events[sequence]
    assert event.prompt_logprobs is not None
    scores = [score.token for score in event.prompt_logprobs[1:] if score is not None]
    assert scores == list(range(2, 48))


@pytest.mark.parametrize("in_flight", [False, True])
def test_an_abandoned_passage_makes_room_for_the_next(in_flight):
    bench = with_passage()
    gone, next_one = (bench.submit(request(range(start, start + 25), 1)) for start in (100, 200))
    bench.step()
    plan = bench.scheduler.plan() if in_flight else None
    bench.scheduler.abort(gone)
    if plan is not None:
        assert bench.scheduler.commit(plan, bench.runner.step(plan)) == []
    following = bench.step()
    assert following is not None
    assert following.long is not None
    assert following.long.token_ids[0] == 200
    bench.run()
    assert list(bench.events) == [next_one]
    bench.assert_all_free()


def test_a_failed_step_ends_the_passage_too():
    bench = with_passage()
    failed = [bench.submit(request(4, 9)), bench.submit(request(25, 9))]
    plan = bench.scheduler.plan()
    assert plan is not None
    assert [sequence for sequence, _ in bench.scheduler.fail(plan, "boom")] == failed
    again = bench.submit(request(range(100, 125), 2))
    bench.run()
    assert bench.tokens(again) == expected(again.request.prompt_ids, 2)
    bench.assert_all_free()


def test_a_passage_that_found_an_error_ends_its_sequence_alone():
    bench = with_passage()
    decoding, long = bench.submit(request(4, 9)), bench.submit(request(25, 9))
    plan = bench.scheduler.plan()
    assert plan is not None
    result = replace(bench.runner.step(plan), long=ChunkResult((), error="boom"))
    events = bench.scheduler.commit(plan, result)
    assert [(sequence, event.error) for sequence, event in events] == [
        (decoding, None),
        (long, "boom"),
    ]
    bench.run()
    assert len(bench.tokens(decoding)) == 8, "the first came with the error"
    bench.assert_all_free()


def test_a_passage_gives_way_to_an_older_one_and_begins_anew():
    bench = with_passage(num_pages=10, page_size=4)
    bench.runner = ScriptedRunner(bench.runner.capacity, long_steps=40)
    old = bench.submit(request(4, 24))  # 7 pages in the end
    bench.step()
    long = bench.submit(request(range(100, 120), 1))  # 5 pages: soon one is lacking
    preempt(bench)
    assert long.stage is Stage.PREEMPTED
    bench.run()
    for sequence in (old, long):
        tokens = bench.tokens(sequence)
        assert tokens == expected(sequence.request.prompt_ids, len(tokens))
    bench.assert_all_free()


@pytest.mark.parametrize("salt", range(6))
def test_pages_for_the_drafts_of_a_passage_stay_its_own(salt):
    """The chunk under way names them, though others have none left."""
    bench = with_passage(num_slots=3, num_pages=13, page_size=4, num_drafts=4)
    bench.submit(request(range(100 + salt, 104 + salt), 40))
    bench.step()
    bench.submit(request(range(200, 224), 12))
    bench.run()
    assert bench.runner.violations == []
    bench.assert_all_free()


def test_the_fake_knows_foreign_outputs_in_a_recomputed_chunk():
    runner = ScriptedRunner(capacity())
    sampling = request(2).sampling
    own = scripted_token((1, 2), 0)
    for token, right in ((own, True), (own + 1, False)):
        chunk = Chunk(3, 0, (1, 2, token), (5,), sampling, True, 2)
        if right:
            assert runner.step(StepPlan((chunk,))).chunks[0].tokens[0] == scripted_token((1, 2), 1)
        else:
            with pytest.raises(PlanError, match="slot 3: not its own token at 2"):
                runner.step(StepPlan((chunk,)))


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"num_drafts": 3},
        {"config": EngineConfig(chunked_prefill_size=8)},
        {"long_tokens": 10, "max_long_tokens": 16},
        {"long_tokens": 10, "max_long_tokens": 16, "num_drafts": 2},
    ],
)
def test_a_constraint_hears_each_output_and_is_asked_before_it(limits):
    bench = Bench(**limits)
    free = bench.submit(request(range(300, 320), 30))
    bound = bench.submit(constrained(request(20, 30), most_tokens))
    bench.run()
    constraint = bound.request.constraint
    assert bench.tokens(free) == expected(free.request.prompt_ids, 30)
    assert bench.tokens(bound) == lawful(bound.request.prompt_ids, 30, most_tokens)
    assert list(constraint.outputs) == bench.tokens(bound)
    asked = [outputs for outputs, _ in constraint.asked]
    assert len(set(asked)) == len(asked), "no place is asked for twice"
    accepted = bench.scheduler.num_accepted
    assert (accepted > 0) == (limits.get("num_drafts", 0) > 0)
    drafts = sum(len(drafts) for _, drafts in constraint.asked)
    assert bool(drafts) == (accepted > 0)
    bench.assert_all_free()


def test_masks_are_begun_with_the_plan_and_only_where_a_token_is_drawn():
    bench = Bench(config=EngineConfig(chunked_prefill_size=6))
    bound = bench.submit(constrained(request(10, 3), most_tokens))
    masked = []
    while (plan := bench.scheduler.plan()) is not None:
        masked.append((plan.chunks[0].masks is not None, len(bound.request.constraint.asked)))
        bench.scheduler.commit(plan, bench.runner.step(plan))
    assert masked == [(False, 0), (True, 1), (True, 2), (True, 3)]


def test_a_prompt_that_is_only_scored_asks_for_no_masks():
    bench = Bench()
    bound = bench.submit(constrained(request(10, 0, prompt_logprobs=0), most_tokens))
    bench.run()
    assert bound.request.constraint.asked == []


def test_preemption_asks_anew_and_repeats_nothing():
    bench = Bench(num_slots=4, num_pages=6, page_size=4)
    for start in (100, 200):
        bench.submit(constrained(request(range(start, start + 4), 12), most_tokens))
    bench.run()
    assert bench.scheduler.num_preemptions == 1
    for sequence in bench.sequences:
        own = lawful(sequence.request.prompt_ids, 12, most_tokens)
        assert bench.tokens(sequence) == own
        assert list(sequence.request.constraint.outputs) == own


def test_a_preempted_passage_that_was_to_draw_draws_what_it_would_have():
    bench = with_passage(num_pages=10, page_size=4)
    bench.runner = ScriptedRunner(bench.runner.capacity, long_steps=40)
    bench.submit(request(4, 24))
    bench.step()
    long = bench.submit(constrained(request(range(100, 120), 1), two_then_end))
    preempt(bench)
    bench.run()
    assert bench.tokens(long) == lawful(long.request.prompt_ids, 1, two_then_end)
    assert [outputs for outputs, _ in long.request.constraint.asked] == [(), ()]


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_a_finished_form_ends_below_min_tokens(num_drafts):
    bench = Bench(num_drafts=num_drafts)
    wanted = request(5, 40, min_tokens=20, stop_token_ids=frozenset({END}))
    bound = bench.submit(constrained(wanted, two_then_end))
    bench.run()
    assert len(bench.tokens(bound)) == 3
    assert bench.events[bound][-1].finish is FinishReason.STOP
    assert bound.request.constraint.outputs[-1] == END
    bench.assert_all_free()


def test_a_constraint_that_breaks_ends_its_own_sequence_only():
    class Broken(RuledConstraint):
        def masks(self, drafts):
            return MadeMasks("boom") if len(self.outputs) == 2 else super().masks(drafts)

    bench = Bench()
    free = bench.submit(request(3, 9))
    bound = bench.submit(replace(request(5, 9), constraint=Broken(most_tokens)))
    bench.run()
    assert bench.events[bound][-1] == TokenEvent(None, FinishReason.ERROR, error="boom")
    assert len(bench.tokens(bound)) == 3, "two tokens and the error"
    assert bench.tokens(free) == expected(free.request.prompt_ids, 9)
    bench.assert_all_free()


@pytest.mark.parametrize("in_flight", [False, True])
def test_an_aborted_sequence_hears_no_more(in_flight):
    bench = Bench()
    bound = bench.submit(constrained(request(3, 9), most_tokens))
    bench.step()
    plan = bench.scheduler.plan() if in_flight else None
    bench.scheduler.abort(bound)
    if plan is not None:
        bench.scheduler.commit(plan, bench.runner.step(plan))
    assert len(bound.request.constraint.outputs) == 1
    bench.assert_all_free()


def test_the_fake_notices_masks_that_are_lacking():
    runner = ScriptedRunner(capacity())
    sampling = request(2).sampling
    first = Chunk(0, 0, (1, 2), (5,), sampling, True, 2, masks=MadeMasks([b"\x10"]))
    assert runner.step(StepPlan((first,))).chunks[0].tokens == (4,)
    for masks, complaint in ((None, "come and go"), (MadeMasks([None, None]), "2 masks")):
        runner.violations.clear()
        again = runner.step(StepPlan((first,))).chunks[0].tokens
        with pytest.raises(PlanError, match=complaint):
            runner.step(StepPlan((Chunk(0, 2, again, (5,), sampling, True, 2, masks=masks),)))


@pytest.mark.parametrize(
    ("seed", "num_drafts", "long_tokens"),
    [(0, 0, 0), (1, 0, 0), (2, 1, 0), (3, 4, 0), (4, 0, 20), (5, 2, 30)],
)
def test_two_thousand_requests_with_cancels_and_failures(seed, num_drafts, long_tokens):
    draw = random.Random(seed)
    bench = Bench(
        num_slots=16,
        num_pages=24,
        num_drafts=num_drafts,
        long_tokens=long_tokens,
        max_long_tokens=2 * long_tokens,
        config=EngineConfig(chunked_prefill_size=48, max_queued_requests=10_000),
    )
    live: list[Sequence] = []
    taken: list[Sequence] = []
    ended: dict[Sequence, FinishReason] = {}
    while len(taken) < 2000 or live:
        if len(taken) < 2000:
            for _ in range(draw.randrange(4)):
                prompt = tuple(draw.randrange(1000) for _ in range(draw.randrange(1, 60)))
                live.append(bench.scheduler.submit(request(prompt, draw.randrange(120))))
                taken.append(live[-1])
        plan = bench.scheduler.plan()
        if live and draw.random() < 0.03:
            sequence = live.pop(draw.randrange(len(live)))
            ended[sequence] = FinishReason.ABORT
            bench.scheduler.abort(sequence)
        if plan is None:
            continue
        result = bench.runner.step(plan)
        failed = draw.random() < 0.01
        commit = bench.scheduler.commit
        for sequence, event in (
            bench.scheduler.fail(plan, "boom") if failed else commit(plan, result)
        ):
            assert sequence not in ended
            bench.events.setdefault(sequence, []).append(event)
            if event.finish is not None:
                ended[sequence] = event.finish
                live.remove(sequence)
    for sequence in taken:
        tokens = [token for token in bench.tokens(sequence) if token is not None]
        if ended[sequence] is FinishReason.LENGTH:
            assert len(tokens) == sequence.max_outputs
        assert tokens == expected(sequence.request.prompt_ids, len(tokens))
    reasons = set(ended.values())
    assert reasons == {FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR}
    assert bench.scheduler.num_preemptions > 50
    assert bench.runner.violations == []
    bench.assert_all_free()


class Traffic(RuleBasedStateMachine):
    """Arbitrary arrivals, cancels, failures and steps on a machine too small for them.

    The pool holds little more than one whole context, and most requests ask for all of it.
    """

    def __init__(self):
        super().__init__()
        self.plan: StepPlan | None = None
        self.order: list[Sequence] = []  # as they were taken
        self.got: dict[Sequence, list[int]] = {}
        self.ended: dict[Sequence, FinishReason] = {}
        self.served: list[Sequence] = []  # in order of first tokens

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        num_drafts=st.sampled_from([0, 0, 1, 3]),
        long_tokens=st.sampled_from([0, 0, 2, 11]),
        passages=st.integers(1, 3),
        long_steps=st.integers(1, 4),
    )
    def build(self, page_size, num_drafts, long_tokens, passages, long_steps):
        self.long_steps = long_steps
        self.runner = ScriptedRunner(
            capacity(
                num_slots=4,
                num_pages=44 // page_size,
                page_size=page_size,
                context_length=40,
                max_step_tokens=9,
                num_drafts=num_drafts,
                long_tokens=long_tokens,
                max_long_tokens=passages * long_tokens,
            ),
            long_steps=long_steps,
        )
        self.scheduler = Scheduler(self.runner.capacity, EngineConfig(max_queued_requests=6))

    @rule(
        num_prompt=st.integers(1, 12) | st.integers(1, 40),
        max_tokens=st.integers(0, 12) | st.just(999),
        salt=st.integers(0, 900),
        scored=st.booleans(),
        rule=st.sampled_from([None, None, most_tokens]),
    )
    def arrive(self, num_prompt, max_tokens, salt, scored, rule):
        prompt = tuple((salt + 7 * i) % 1000 for i in range(num_prompt))
        wanted = request(prompt, max_tokens, prompt_logprobs=0 if scored else None)
        try:
            sequence = self.scheduler.submit(constrained(wanted, rule) if rule else wanted)
        except RequestTooLarge:
            assert num_prompt + min(max_tokens, 1) > 40
        except QueueFull:
            assert sum(s.stage is Stage.WAITING for s in self.open()) >= 6
        else:
            self.order.append(sequence)
            self.got[sequence] = []

    @precondition(lambda self: self.open())
    @rule(index=st.integers(0, 100))
    def cancel(self, index):
        live = self.open()
        sequence = live[index % len(live)]
        self.scheduler.abort(sequence)
        self.ended[sequence] = FinishReason.ABORT

    @precondition(lambda self: self.plan is None)
    @rule()
    def begin_step(self):
        decoding = [s for s in self.open() if s.slot >= 0 and s.is_decoding]
        self.plan = self.scheduler.plan()
        if self.plan is None:
            assert self.open() == []
            return
        assert self.plan.num_tokens <= 9
        chunks = [*self.plan.chunks, *([self.plan.long] if self.plan.long else [])]
        slots = {chunk.slot for chunk in chunks}
        assert all(s.slot in slots for s in decoding if s.stage is Stage.RUNNING)
        # Whoever came first gets on in every step: nobody starves, and every step leads somewhere.
        assert self.open()[0].slot in slots

    @precondition(lambda self: self.plan is not None)
    @rule(fails=st.sampled_from([False] * 9 + [True]))
    def end_step(self, fails):
        plan, self.plan = self.plan, None
        assert plan is not None
        if fails:
            events = self.scheduler.fail(plan, "boom")
            assert all(event.finish is FinishReason.ERROR for _, event in events)
        else:
            events = self.scheduler.commit(plan, self.runner.step(plan))
        for sequence, event in events:
            self.note(sequence, event)

    @precondition(lambda self: self.plan is None and self.open())
    @rule(count=st.integers(2, 30))
    def some_steps(self, count):
        for _ in range(count):
            self.begin_step()
            if self.plan is None:
                break
            self.end_step(False)

    def note(self, sequence: Sequence, event: TokenEvent) -> None:
        assert sequence not in self.ended
        if event.finish is not FinishReason.ERROR:
            self.check_scores(sequence, event)
        if event.token is not None:
            if not self.got[sequence]:
                self.served.append(sequence)
            self.got[sequence].append(event.token)
        if event.finish is not None:
            self.ended[sequence] = event.finish

    def check_scores(self, sequence: Sequence, event: TokenEvent) -> None:
        asked = sequence.request.sampling.prompt_logprobs is not None
        if not asked or self.got[sequence]:
            assert event.prompt_logprobs is None
            return
        assert event.prompt_logprobs is not None
        first, *others = event.prompt_logprobs
        assert first is None
        assert [s.token for s in others if s] == list(sequence.request.prompt_ids[1:])

    def open(self) -> list[Sequence]:
        return [sequence for sequence in self.order if sequence not in self.ended]

    @invariant()
    def first_tokens_come_in_order_of_arrival(self):
        """But for the long prompts, which keep it among themselves: those that one passage takes
        whole, and those that leave a rest to the steps, which the next passage may overtake."""
        rank = {sequence: i for i, sequence in enumerate(self.order)}
        capacity = self.scheduler._capacity
        least, most = capacity.long_tokens or 999, capacity.max_long_tokens
        for kind in (0, 1, 2):
            ranks = [
                rank[s]
                for s in self.served
                if (s.num_prompt >= least) + (s.num_prompt > max(least, most)) == kind
            ]
            assert ranks == sorted(ranks)

    @invariant()
    def all_stand_in_order_of_arrival(self):
        ranks = [
            [Stage.RUNNING, Stage.PREEMPTED, Stage.WAITING].index(s.stage) for s in self.open()
        ]
        assert ranks == sorted(ranks)

    @invariant()
    def only_an_end_lets_the_preempted_run_again(self):
        assert self.scheduler.num_preemptions <= 3 * (len(self.ended) + 1)

    @invariant()
    def tokens_are_its_own(self):
        for sequence in self.order:
            got, constraint = self.got[sequence], sequence.request.constraint
            if constraint is None:
                assert got == expected(sequence.request.prompt_ids, len(got))
            else:
                assert got == lawful(sequence.request.prompt_ids, len(got), most_tokens)
                assert list(constraint.outputs) == got

    def teardown(self):
        if self.plan is not None:
            self.end_step(False)
        # A bound without starvation: one after the other, each a step per token at the most.
        bound = 1 + sum((s.num_prompt + s.max_outputs) * self.long_steps for s in self.open())
        for _ in range(bound):
            self.begin_step()
            if self.plan is None:
                break
            self.end_step(False)
        assert self.open() == []
        for sequence in self.order:
            if self.ended[sequence] is FinishReason.LENGTH:
                assert len(self.got[sequence]) == sequence.max_outputs
        assert self.runner.violations == []
        assert self.scheduler.is_empty
        assert self.scheduler.num_free_pages == self.scheduler.num_pages
        assert self.scheduler.num_free_slots == 4


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
