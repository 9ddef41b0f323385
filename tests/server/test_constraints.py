from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from functools import partial
from queue import SimpleQueue

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from kttrio.config import EngineConfig
from kttrio.engine.engine import Engine
from kttrio.request import FinishReason, GenerateRequest, SamplingParams
from kttrio.server import constraints
from kttrio.server.constraints import Constraints, MaskThreads, MatchedConstraint
from kttrio.server.errors import ApiError
from kttrio.text.grammar_error import GrammarError
from tests.fakes import ScriptedRunner, capacity, mask_of, scripted_token


class Evens:
    """A matcher of even tokens: mask i of an answer also allows the odd token 2 i + 1.

    `gate` holds it up, `fails` makes it raise, and it notices two threads at once.
    """

    def __init__(self, *, gate=None, fails=None):
        self.tokens: list[int] = []
        self.threads: set[str] = set()
        self.gate = gate
        self.fails = fails
        self.alone = threading.Lock()

    def masks(self, drafts):
        assert self.alone.acquire(blocking=False), "two threads at once"
        self.threads.add(threading.current_thread().name)
        if self.gate is not None:
            self.gate.wait()
        self.alone.release()
        if self.fails is not None:
            raise self.fails
        return [mask_after(len(self.tokens) + place) for place in range(1 + len(drafts))]

    def advance(self, tokens):
        assert tokens, "nothing to tell"
        self.tokens += tokens


class Clock:
    """So many seconds pass between its readings."""

    def __init__(self, seconds):
        self._times = itertools.count(0, seconds)

    def read(self):
        return next(self._times)


def nothing():
    """No grammar is kept."""


def mask_after(num_tokens):
    return mask_of([*range(0, 1000, 2), 2 * num_tokens + 1])


class TestMatchedConstraint:
    def test_masks_are_made_elsewhere_and_drawn_tokens_wait_until_then(self):
        matcher = Evens()
        with MaskThreads(1) as threads:
            constraint = MatchedConstraint(matcher, threads)
            assert constraint.masks(()).wait() == [mask_after(0)]
            for token in (4, 6):
                constraint.advance(token)
            assert matcher.tokens == []
            assert constraint.masks((8, 2)).wait() == [mask_after(n) for n in (2, 3, 4)]
            assert matcher.tokens == [4, 6]
        assert matcher.threads == {"masks-0"}

    def test_asking_never_waits(self):
        gate = threading.Event()
        with MaskThreads(1) as threads:
            made = [MatchedConstraint(Evens(gate=gate), threads).masks(()) for _ in range(9)]
            gate.set()
            assert [masks.wait() for masks in made] == [[mask_after(0)]] * 9

    def test_masks_may_be_looked_at_again(self):
        with MaskThreads(1) as threads:
            made = MatchedConstraint(Evens(), threads).masks(())
            assert made.wait() == made.wait()

    @pytest.mark.parametrize("failure", [ValueError("the secret"), KeyboardInterrupt()])
    def test_a_failure_is_its_own_answers_only(self, failure, caplog):
        with MaskThreads(1) as threads, caplog.at_level(logging.INFO):
            broken = MatchedConstraint(Evens(fails=failure), threads).masks(())
            sound = MatchedConstraint(Evens(), threads).masks(())
            with pytest.raises(RuntimeError, match="could not be made"):
                broken.wait()
            assert sound.wait() == [mask_after(0)]
        assert type(failure).__name__ in caplog.text
        assert "secret" not in caplog.text

    def test_a_grammar_that_is_too_costly_is_the_requests_fault(self, caplog):
        with MaskThreads(1) as threads, caplog.at_level(logging.INFO):
            constraint = MatchedConstraint(Evens(fails=GrammarError("too many items")), threads)
            assert constraint.complaint is None
            with pytest.raises(RuntimeError, match="too many items"):
                constraint.masks(()).wait()
        assert constraint.complaint is not None
        assert "any further: too many items" in constraint.complaint
        assert caplog.text == "", "floods of them leave no trace"

    @pytest.mark.parametrize(("seconds", "most"), [(0.0, 400), (0.0009, 400), (0.007, 42), (1, 1)])
    def test_a_grammar_that_stays_slow_ends_its_answer(self, seconds, most, monkeypatch):
        """Of the processor's time; a slow mask now and then is none of its business."""
        clock = Clock(seconds)
        monkeypatch.setattr(constraints, "thread_time", clock.read)
        num_made = 0
        with MaskThreads(1) as threads:
            constraint = MatchedConstraint(Evens(), threads)
            with contextlib.suppress(RuntimeError):
                while num_made < 400:
                    constraint.masks(()).wait()
                    num_made += 1
        assert num_made == (400 if most == 400 else most - 1)
        assert (constraint.complaint is None) == (most == 400)

    def test_each_draft_has_its_own_due(self, monkeypatch):
        monkeypatch.setattr(constraints, "thread_time", Clock(0.0025).read)
        with MaskThreads(1) as threads:
            constraint = MatchedConstraint(Evens(), threads)
            for _ in range(100):
                constraint.masks((1, 2)).wait()

    def test_masks_that_take_too_long_are_given_up(self, monkeypatch):
        monkeypatch.setattr(constraints, "MASK_SECONDS", 0.05)
        gate = threading.Event()
        with MaskThreads(2) as threads:
            late = MatchedConstraint(Evens(gate=gate), threads).masks(())
            begin = time.monotonic()
            for _ in range(2):
                with pytest.raises(RuntimeError, match=r"not known within 0\.05 s"):
                    late.wait()
            assert time.monotonic() - begin < 5
            sound = MatchedConstraint(Evens(), threads).masks(())
            assert sound.wait() == [mask_after(0)]
            gate.set()

    def test_the_end_answers_all_who_have_asked_and_leaves_no_thread(self):
        before = set(threading.enumerate())
        with MaskThreads(3) as threads:
            made = [MatchedConstraint(Evens(), threads).masks(()) for _ in range(50)]
        assert set(threading.enumerate()) == before
        assert all(masks.wait() for masks in made)

    def test_a_thread_that_never_comes_back_does_not_hold_up_the_end(self, monkeypatch, caplog):
        monkeypatch.setattr(constraints, "MASK_SECONDS", 0.05)
        gate = threading.Event()
        with MaskThreads(2) as threads:
            late = MatchedConstraint(Evens(gate=gate), threads).masks(())
            sound = MatchedConstraint(Evens(), threads).masks(())
        assert "left behind" in caplog.text
        assert sound.wait() == [mask_after(0)]
        with pytest.raises(RuntimeError, match="not known within"):
            late.wait()
        gate.set()

    @given(
        rounds=st.lists(
            st.tuples(st.booleans(), st.lists(st.integers(0, 99), max_size=4)), max_size=30
        )
    )
    @settings(max_examples=50, deadline=None)
    def test_steps_that_are_given_up_spoil_nothing(self, rounds):
        """A round asks, maybe twice without a look at the first, and draws some tokens."""
        matcher, drawn = Evens(), []
        with MaskThreads(3) as threads:
            constraint = MatchedConstraint(matcher, threads)
            for twice, tokens in rounds:
                if twice:
                    constraint.masks(())
                assert constraint.masks(()).wait() == [mask_after(len(drawn))]
                for token in tokens:
                    constraint.advance(token)
                drawn += tokens
        assert matcher.tokens == drawn[: len(matcher.tokens)]


class Steps(ScriptedRunner):
    """Tells when a step begins, and waits for leave to go on."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.begun: SimpleQueue[int] = SimpleQueue()

    def step(self, plan):
        self.begun.put(len(plan.chunks))
        return super().step(plan)


async def answer_of(engine, name, prompt, constraint=None, **sampling):
    params = SamplingParams(**{"max_tokens": 6, "seed": 0, **sampling})
    async with engine.open(GenerateRequest(name, prompt, params, constraint=constraint)) as stream:
        return [event async for event in stream]


async def run_engine(runner, body):
    engine = Engine(runner, EngineConfig())
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            await body(engine)
            nursery.cancel_scope.cancel()
    assert runner.violations == []


@pytest.mark.parametrize("num_drafts", [0, 3])
async def test_the_engine_draws_what_the_matcher_allows(num_drafts):
    matchers = [Evens() for _ in range(4)]

    async def body(engine):
        with Constraints() as opened:
            found = await opened.open(lambda: matchers, recall=nothing)
            async with trio.open_nursery() as nursery:
                for number, constraint in enumerate(found):
                    nursery.start_soon(check, engine, (number, 1), constraint)

    async def check(engine, prompt, constraint):
        events = await answer_of(engine, "r", prompt, constraint)
        tokens = [event.token for event in events]
        for place, token in enumerate(tokens):
            scripted = scripted_token(prompt, place)
            allowed = scripted % 2 == 0 or scripted == 2 * place + 1
            assert token == (scripted if allowed else 0)

    await run_engine(ScriptedRunner(capacity(num_drafts=num_drafts)), body)


async def test_masks_are_made_while_the_step_computes():
    """The step has begun before the matcher may do anything; the loop is free all the time."""
    gate = threading.Event()
    runner = Steps(capacity())

    async def body(engine):
        with Constraints() as opened:
            (constraint,) = await opened.open(lambda: [Evens(gate=gate)], recall=nothing)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer_of, engine, "r", (1, 2), constraint)
                assert await trio.to_thread.run_sync(runner.begun.get) == 1
                gate.set()

    await run_engine(runner, body)


async def test_a_matcher_that_fails_ends_its_request_and_no_other():
    async def body(engine):
        with Constraints() as opened:
            pair = [Evens(fails=ValueError("x")), Evens()]
            broken, sound = await opened.open(lambda: pair, recall=nothing)
            ends = {}

            async def note(name, constraint):
                ends[name] = (await answer_of(engine, name, (3, 4), constraint))[-1]

            async with trio.open_nursery() as nursery:
                nursery.start_soon(note, "broken", broken)
                nursery.start_soon(note, "sound", sound)
                nursery.start_soon(note, "free", None)
        assert ends["broken"].finish is FinishReason.ERROR
        assert "could not be made" in ends["broken"].error
        assert [ends[name].finish for name in ("sound", "free")] == [FinishReason.LENGTH] * 2
        assert engine.stats.healthy

    await run_engine(ScriptedRunner(capacity()), body)


class TestCompiling:
    async def test_it_is_done_in_another_thread(self):
        names = []

        def compile():
            names.append(threading.current_thread())
            return [Evens()]

        with Constraints() as opened:
            assert len(await opened.open(compile, recall=nothing)) == 1
        assert names != [threading.main_thread()]

    async def test_what_is_wrong_is_raised(self):
        def compile():
            raise ValueError("no such rule")

        with Constraints() as opened, pytest.raises(ValueError, match="no such rule"):
            await opened.open(compile, recall=nothing)

    async def test_few_are_compiled_at_once_and_those_who_wait_are_counted(self, monkeypatch):
        monkeypatch.setattr(constraints, "MOST_WAITING", 3)
        gate, running = threading.Event(), SimpleQueue()

        def compile():
            running.put(1)
            gate.wait()
            return [Evens()]

        with Constraints() as opened, trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for _ in range(constraints.NUM_COMPILING + 3):
                    nursery.start_soon(partial(opened.open, compile, recall=nothing))
                await trio.testing.wait_all_tasks_blocked()
                kept = await opened.open(compile, recall=lambda: [Evens()])
                assert len(kept) == 1, "it waits for none of them"
                with pytest.raises(ApiError) as refused:
                    await opened.open(compile, recall=nothing)
                assert (refused.value.status, refused.value.code) == (429, "queue_full")
                assert running.qsize() <= constraints.NUM_COMPILING
                gate.set()

    async def test_who_leaves_the_queue_makes_room(self, monkeypatch):
        monkeypatch.setattr(constraints, "MOST_WAITING", 1)
        gate = threading.Event()

        def compile():
            gate.wait()
            return [Evens()]

        with Constraints() as opened, trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for _ in range(constraints.NUM_COMPILING):
                    nursery.start_soon(partial(opened.open, compile, recall=nothing))
                await trio.testing.wait_all_tasks_blocked()
                with trio.move_on_after(0.01):
                    await opened.open(compile, recall=nothing)
                nursery.start_soon(partial(opened.open, compile, recall=nothing))
                await trio.testing.wait_all_tasks_blocked()
                gate.set()
