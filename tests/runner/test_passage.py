"""A long prompt's way, unit by unit, on a model of exact arithmetic."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from kttrio.layers.cache import AttentionCache
from kttrio.models.base import Activations, CacheShape, ModelShape
from kttrio.plan import StepPlan
from kttrio.runner import passage
from kttrio.runner.passage import cut, joined, passage_bytes
from kttrio.runner.runner import Runner
from tests.runner.toy import CAPACITY, PAGE_SIZE, ToyModel, chunk_of

LONG = replace(CAPACITY, max_step_tokens=8, long_tokens=10, max_long_tokens=36)
PROMPT = tuple(3 + 5 * i % 90 for i in range(27))
NUM_UNITS = 4 + 2 * (4 + 4) + 4  # pieces of 8, 8, 8 and 3: embedded, mixed and fed twice, read


@contextmanager
def a_unit_each_step():
    with patch.object(passage, "_SHARE", 0.0), patch.object(passage, "_ALONE", 0.0):
        yield


def new_runner(model=None, **changes) -> Runner:
    capacity, model = replace(LONG, **changes), model or ToyModel()
    caches = model.new_caches(
        num_pages=capacity.num_pages, page_size=PAGE_SIZE, num_slots=capacity.num_slots
    )
    return Runner(model, caches, capacity=capacity, device=torch.device("cpu"))


def long_of(slot=3, prompt=PROMPT, **changes):
    return chunk_of(slot, token_ids=prompt, **{"temperature": 0.0, **changes})


def decode(slot, start):
    return chunk_of(slot, start=start, token_ids=(7,), num_prompt=1, temperature=0.0)


def pass_through(runner, long, *chunks):
    """Steps until the result is there: it, how many there were, and those beside it."""
    beside = []
    for number in range(1, 200):
        result = runner.step(StepPlan(chunks, long))
        beside.append(result.chunks)
        if result.long is not None:
            return result.long, number, beside
    raise AssertionError("it never ends")


def in_chunks(long, size=8, **changes):
    runner = new_runner(**changes)
    return joined(
        [runner.step(StepPlan((part,))).chunks[0] for part in cut(long, size, page_size=PAGE_SIZE)]
    )


@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize("length", [10, 16, 17, 27, 36])
def test_the_result_is_that_of_chunks(length, num_drafts):
    long = long_of(
        prompt=tuple(3 + 5 * i % 90 for i in range(length)),
        prompt_logprobs=2,
        logprobs=3,
        frequency_penalty=0.5,
    )
    if num_drafts:
        ahead = long_of(prompt=(1,) * (length + num_drafts))
        long = long._replace(draft_end=40, pages=ahead.pages)
    with a_unit_each_step():
        found, _, _ = pass_through(new_runner(num_drafts=num_drafts), long)
    assert found == in_chunks(long, num_drafts=num_drafts)
    assert len(found.prompt_logprobs) == length - 1
    assert len(found.drafts) == num_drafts


def test_a_step_does_one_unit_at_least_and_others_get_their_tokens_in_each():
    """The bound on how long those who decode wait for a prompt, in units: one in each step."""
    runner, other = new_runner(), new_runner()
    with a_unit_each_step():
        found, steps, beside = pass_through(runner, long_of(), decode(0, 0))
        assert found == in_chunks(long_of())
    assert steps == NUM_UNITS
    expected = [other.step(StepPlan((decode(0, 0),))).chunks for _ in range(steps)]
    assert beside == expected


class Clock:
    """A second passes with each look at it."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


@pytest.mark.parametrize(("seconds", "units"), [(1.0, 1), (3.0, 3), (7.5, 8)])
def test_it_takes_about_as_long_as_the_step_beside_it(seconds, units):
    runner, done = new_runner(), []
    clock = Clock()
    way = runner._passages._way

    def counted(chunk):
        for result in way(chunk):
            done.append(result)
            yield result

    with (
        patch.object(passage, "time", clock),
        patch.object(runner._passages, "_way", counted),
        torch.inference_mode(),
    ):
        assert runner._passages.advance(long_of(), seconds=seconds) is None
    assert len(done) == units


def test_alone_it_looks_up_twenty_times_a_second():
    runner = new_runner()
    clock = SimpleNamespace(perf_counter=iter([0.0, 0.01, 0.04, 0.06]).__next__)
    with patch.object(passage, "time", clock), torch.inference_mode():
        assert runner._passages.advance(long_of(), seconds=0.0) is None
        assert next(clock.perf_counter.__self__, None) is None, "three units"


class Lagging:
    """A stream whose events tell when they are waited for."""

    def __init__(self):
        self.log = []

    def record(self):
        self.log.append(f"unit {len(self.log)}")
        name = self.log[-1]
        return SimpleNamespace(synchronize=lambda: self.log.append(f"waited for {name}"))


def test_a_device_gets_no_more_than_a_unit_ahead():
    main = Lagging()
    seam = SimpleNamespace(main=main, check_jobs=list)
    model = ToyModel()
    caches = model.new_caches(num_pages=200, page_size=PAGE_SIZE, num_slots=20)
    runner = Runner(model, caches, capacity=LONG, device=torch.device("cpu"), seam=seam)
    with a_unit_each_step():
        for _ in range(3):
            runner.step(StepPlan((), long_of()))
    assert main.log == ["unit 0", "unit 1", "waited for unit 0", "unit 3", "waited for unit 1"]


def test_an_abandoned_passage_leaves_no_trace():
    runner = new_runner()
    with a_unit_each_step():
        for _ in range(9):
            runner.step(StepPlan((decode(0, 0),), long_of(presence_penalty=1.0)))
        runner.step(StepPlan((decode(0, 0),)))
        again = long_of(prompt=PROMPT[::-1])
        found, steps, _ = pass_through(runner, again)
    assert (found, steps) == (in_chunks(again), NUM_UNITS)


def test_another_passage_may_follow_at_once():
    runner = new_runner()
    second = long_of(5, PROMPT[::-1])
    with a_unit_each_step():
        for _ in range(9):
            runner.step(StepPlan((), long_of()))
        found, steps, _ = pass_through(runner, second)
    assert (found, steps) == (in_chunks(second), NUM_UNITS)


def test_a_later_piece_of_a_prompt_goes_on_where_the_last_one_ended():
    prompt = tuple(3 + 7 * i % 90 for i in range(37))
    scored = {"prompt_logprobs": 1, "num_prompt": 37}
    first = long_of(prompt=prompt[:20], sample=False, **scored)
    second = long_of(prompt=prompt[20:36], start=20, sample=False, **scored)
    last = chunk_of(3, token_ids=prompt[36:], start=36, temperature=0.0, **scored)
    runner, plain = new_runner(), new_runner()
    found = [pass_through(runner, each)[0] for each in (first, second)]
    found += runner.step(StepPlan((last,))).chunks
    chunks = [part for each in (first, second, last) for part in cut(each, 8, page_size=PAGE_SIZE)]
    assert joined(found) == joined([plain.step(StepPlan((part,))).chunks[0] for part in chunks])


@pytest.mark.parametrize("number", range(NUM_UNITS))
def test_a_unit_that_fails_costs_its_own_sequence_only(number, caplog):
    """Wherever: the step beside it stands, and the next passage is whole."""
    runner = new_runner()
    way = runner._passages._way

    def failing(chunk):
        units = way(chunk)
        for _ in range(number):
            yield next(units)
        units.close()
        raise RuntimeError("boom")

    with a_unit_each_step(), patch.object(runner._passages, "_way", failing):
        found, steps, beside = pass_through(runner, long_of(), decode(0, 0))
    assert (found.error, steps) == ("RuntimeError: boom", number + 1)
    assert all(result.error is None and result.tokens for (result,) in beside)
    assert "a long prompt of 27 tokens failed" in caplog.text
    assert pass_through(runner, long_of())[0] == in_chunks(long_of())


def test_a_poisoned_prompt_is_an_error_in_its_result(caplog):
    runner = new_runner()
    poisoned = long_of(prompt=(*PROMPT[:20], ToyModel.poison))
    broken = long_of(prompt=(*PROMPT[:20], ToyModel.broken))
    assert "poisoned" in pass_through(runner, poisoned)[0].error
    assert "not finite" in pass_through(runner, broken)[0].error
    assert pass_through(runner, long_of())[0] == in_chunks(long_of())


def test_a_failed_step_ends_the_passage_beside_it():
    runner = new_runner()
    poisoned = chunk_of(0, token_ids=(ToyModel.poison,))
    with a_unit_each_step():
        for _ in range(5):
            runner.step(StepPlan((), long_of()))
        with pytest.raises(RuntimeError, match="poisoned"):
            runner.step(StepPlan((poisoned,), long_of()))
        found, steps, _ = pass_through(runner, long_of())
    assert steps == NUM_UNITS, "it began anew"
    assert found == in_chunks(long_of())


def test_what_is_dropped_is_closed():
    """Whatever a layer has under way when its prompt leaves, its generator hears of it."""
    closed = []

    class Streaming(ToyModel):
        def feed(self, layer, rows, **settings):
            try:
                yield from super().feed(layer, rows, **settings)
            except GeneratorExit:
                closed.append(layer)
                raise

    for end in (
        lambda runner: runner.step(StepPlan((decode(0, 0),))),
        lambda runner: runner.close(),
    ):
        runner = new_runner(Streaming())
        with a_unit_each_step():
            for _ in range(4 + 4 + 2):
                runner.step(StepPlan((), long_of()))
            end(runner)
    assert closed == [0, 0]


def test_room_for_the_longest_is_there_from_the_start():
    rooms = []

    class Counting(ToyModel):
        def new_activations(self, num_tokens):
            rooms.append(num_tokens)
            return super().new_activations(num_tokens)

    runner = new_runner(Counting())
    pass_through(runner, long_of())
    assert rooms == [36]
    new_runner(Counting(), long_tokens=0, max_long_tokens=0)
    assert rooms == [36], "none where there are no long prompts"


def test_a_chunk_is_cut_as_steps_would():
    long = long_of(num_prompt=30, sample=True)._replace(draft_end=40, pages=tuple(range(9)))
    parts = list(cut(long, 8, page_size=4))
    assert [(part.start, len(part.token_ids)) for part in parts] == [
        (0, 8),
        (8, 8),
        (16, 8),
        (24, 3),
    ]
    assert [len(part.pages) for part in parts] == [2, 4, 6, 9], "the last has room for drafts"
    assert [part.sample for part in parts] == [False, False, False, True]
    assert [part.following for part in parts] == [PROMPT[8], PROMPT[16], PROMPT[24], None]
    assert [part.draft_end for part in parts] == [0, 0, 0, 40]
    assert tuple(token for part in parts for token in part.token_ids) == PROMPT


def test_nobody_follows_where_no_drafts_are_made():
    assert {part.following for part in cut(long_of(), 8, page_size=4)} == {None}


def test_the_bytes_are_those_of_the_rows_and_a_little():
    shape = ModelShape(1000, 64, 4096, 3, 16, 4)
    rows = Activations.new(100, 64, dtype=torch.bfloat16, device=torch.device("cpu"))
    held = sum(tensor.nbytes for tensor in rows) / 100

    def bytes_of(bytes_chosen=0, **what):
        return passage_bytes(
            shape, CacheShape(0, 0, bytes_chosen=bytes_chosen), row_bytes=128, **what
        )

    plain = bytes_of()
    assert held < plain < 1.3 * held
    assert bytes_of(recorded=True) - plain == 2 * 3 * 4 * 4
    assert bytes_of(deferred=True) - plain == 2 * 64 * 4
    assert bytes_of(bytes_chosen=8) - plain == 8


def test_its_caches_are_as_after_chunks():
    runner, plain = new_runner(), new_runner()
    with a_unit_each_step():
        pass_through(runner, long_of(), decode(0, 0))
    for part in cut(long_of(), 8, page_size=PAGE_SIZE):
        plain.step(StepPlan((decode(0, 0), part)))
    for ours, theirs in zip(runner._caches, plain._caches, strict=True):
        names = ("key",) if isinstance(ours, AttentionCache) else ("state",)
        for name in names:
            found, expected = getattr(ours, name), getattr(theirs, name)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
