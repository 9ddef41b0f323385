"""The step loop with its real thread: real time, `trio.fail_after`, no virtual clock."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import trio

from kttrio.config import EngineConfig
from kttrio.engine.engine import Engine, EngineStats
from kttrio.engine.errors import EngineClosed, QueueFull, RequestTooLarge
from kttrio.plan import ChunkResult, StepPlan, StepResult
from kttrio.request import FinishReason, GenerateRequest, SamplingParams, TokenEvent
from tests.fakes import ScriptedRunner, capacity, scripted_token
from tests.pictures import image_input


def request(prompt=(1, 2, 3), max_tokens=4, **sampling) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=0, **sampling)
    return GenerateRequest("r", tuple(prompt), params)


def expected(prompt: tuple[int, ...], count: int) -> list[int]:
    return [scripted_token(prompt, i) for i in range(count)]


def assert_nothing_left(engine: Engine) -> None:
    stats = engine.stats
    assert (stats.running, stats.waiting) == (0, 0)
    assert (stats.free_pages, stats.free_slots) == (stats.num_pages, stats.num_slots)
    assert not engine._streams  # a leak here shows nowhere else


@contextlib.asynccontextmanager
async def running(runner: ScriptedRunner, config: EngineConfig | None = None, seconds=20):
    """An engine that runs for the block and must leave nothing behind, in the runner neither."""
    engine = Engine(runner, config or EngineConfig())
    with trio.fail_after(seconds):
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            yield engine
            await engine.drained()
            assert_nothing_left(engine)
            nursery.cancel_scope.cancel()
    assert runner.violations == []
    assert_nothing_left(engine)


class GatedRunner(ScriptedRunner):
    """Every step waits until it is let through."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = threading.Semaphore(0)
        self.is_open = False
        self.entered = threading.Semaphore(0)

    def step(self, plan: StepPlan) -> StepResult:
        self.entered.release()
        assert self.is_open or self.gate.acquire(timeout=10)
        return super().step(plan)

    async def in_step(self) -> None:
        """Wait until the thread is inside a step."""
        assert await trio.to_thread.run_sync(lambda: self.entered.acquire(timeout=10))

    def open_gate(self) -> None:
        self.is_open = True
        self.gate.release()


async def open_and_close(engine: Engine, wanted: GenerateRequest) -> None:
    async with engine.open(wanted):
        pass


async def open_and_run(engine: Engine, wanted: GenerateRequest) -> None:
    async with engine.open(wanted) as stream:
        await stream.wait()


async def collect(events: AsyncIterator[TokenEvent]) -> list[TokenEvent]:
    return [event async for event in events]


async def test_iterating_over_a_request():
    async with running(ScriptedRunner()) as engine:
        async with engine.open(request(max_tokens=5)) as stream:
            events = await collect(stream)
        assert [event.token for event in events] == expected((1, 2, 3), 5)
        assert events[-1].finish is FinishReason.LENGTH
        stats = engine.stats
        assert (stats.steps, stats.generated_tokens, stats.failed_steps) == (5, 5, 0)
        assert stats.healthy
        assert stats.last_step_seconds > 0.0


async def test_a_long_prompt_passes_while_others_decode():
    runner = ScriptedRunner(capacity(long_tokens=20, max_long_tokens=50), long_steps=9)
    prompt = tuple(range(100, 160))
    async with running(runner) as engine, trio.open_nursery() as nursery:
        nursery.start_soon(open_and_run, engine, request(max_tokens=30))
        async with engine.open(request(prompt, max_tokens=3)) as stream:
            events = await collect(stream)
    assert [event.token for event in events] == expected(prompt, 3)
    assert sum(bool(plan.long and plan.chunks) for plan in runner.history) > 5


async def test_a_failed_passage_costs_the_others_nothing_but_health():
    class Failing(ScriptedRunner):
        def step(self, plan: StepPlan) -> StepResult:
            result = super().step(plan)
            if plan.long is None:
                return result
            return replace(result, long=ChunkResult((), error="boom"))

    seen: list[tuple[bool, str | None]] = []

    def look(_: TokenEvent) -> None:
        seen.append((engine.stats.healthy, engine.stats.error))

    async with (
        running(Failing(capacity(long_tokens=20, max_long_tokens=50))) as engine,
        engine.open(request(max_tokens=5), look) as short,
        engine.open(request(range(30))) as long,
    ):
        last = await long.wait()
        assert (last.finish, last.error) == (FinishReason.ERROR, "boom")
        assert (await short.wait()).finish is FinishReason.LENGTH
    assert (False, "boom") in seen
    assert seen[-1] == (True, None)


async def test_an_idle_engine_keeps_no_images():
    """They may be hundreds of megabytes; the thread that waits is the last to know of them."""
    runner, image = ScriptedRunner(), image_input(0, 1, 1)
    async with running(runner, seconds=5) as engine:
        alone = sys.getrefcount(image)
        await open_and_run(engine, replace(request(), images=(image,)))
        assert runner.history[0].chunks[0].images == (image,)
        runner.history.clear()
        while sys.getrefcount(image) > alone:
            await trio.lowlevel.checkpoint()


async def test_drafts_bring_several_events_in_a_step():
    async with running(ScriptedRunner(capacity(num_drafts=3))) as engine:
        assert engine.speculates
        async with engine.open(request(max_tokens=50)) as stream:
            events = await collect(stream)
        assert [event.token for event in events] == expected((1, 2, 3), 50)
        stats = engine.stats
        assert stats.steps < stats.generated_tokens == 50
        assert stats.accepted_draft_tokens == sum(event.accepted for event in events) > 0
        rejected = stats.draft_tokens - stats.accepted_draft_tokens
        assert rejected == sum(event.rejected for event in events) > 0


async def test_a_stream_may_be_closed_by_the_first_of_several_tokens():
    """Its sink does so when a stop string is complete; what the step drew beyond it is dropped."""
    got: list[TokenEvent] = []

    def sink(event: TokenEvent) -> None:
        got.append(event)
        if event.accepted:
            stream.close()

    async with running(ScriptedRunner(capacity(num_drafts=3))) as engine:
        async with engine.open(request(max_tokens=50), sink) as stream:
            await stream.wait()
        assert [event.accepted for event in got].count(True) == 1
        assert got[-1].accepted


async def test_pushing_to_a_sink_wakes_the_task_only_at_the_end():
    got: list[TokenEvent] = []
    async with running(ScriptedRunner()) as engine:
        async with engine.open(request(max_tokens=6), got.append) as stream:
            last = await stream.wait()
        assert [event.token for event in got] == expected((1, 2, 3), 6)
        assert last is got[-1]


async def test_many_requests_at_once_each_get_their_own_tokens():
    async def client(engine: Engine, number: int) -> None:
        prompt = tuple(range(number, number + 5 + number % 30))
        async with engine.open(request(prompt, 3 + number % 20)) as stream:
            tokens = [event.token async for event in stream]
        assert tokens == expected(prompt, 3 + number % 20)

    async with running(ScriptedRunner()) as engine, trio.open_nursery() as nursery:
        for number in range(150):
            nursery.start_soon(client, engine, number)


async def test_two_hundred_clients_vanish_mid_stream():
    draw = random.Random(1)
    runner = ScriptedRunner(capacity(num_slots=64, num_pages=4096), delay=0.0005)

    async def client(engine: Engine, number: int) -> None:
        stay = draw.randrange(1, 15)
        async with trio.open_nursery() as own:

            def sink(event: TokenEvent) -> None:
                nonlocal stay
                stay -= 1
                if stay == 0:
                    own.cancel_scope.cancel()

            async with engine.open(request((number,) * 20, 900), sink) as stream:
                await stream.wait()

    async with running(runner) as engine:
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(client, engine, number)
        await engine.drained()
        assert_nothing_left(engine)
        assert trio.lowlevel.current_statistics().run_sync_soon_queue_size == 0


async def test_requests_without_limit_share_a_small_pool_and_lose_nothing():
    async def client(engine: Engine, number: int) -> None:
        async with engine.open(request((number,) * 5, 10_000)) as stream:
            events = await collect(stream)
        assert [event.token for event in events] == expected((number,) * 5, 59)
        assert events[-1].finish is FinishReason.LENGTH

    runner = ScriptedRunner(capacity(num_slots=4, num_pages=20, page_size=4, context_length=64))
    async with running(runner) as engine:
        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(client, engine, number)
        stats = engine.stats
        assert stats.preemptions > 0
        assert stats.generated_tokens == 12 * 59


async def test_client_of_a_preempted_request_leaves_at_once():
    runner = GatedRunner(capacity(num_slots=2, num_pages=6, page_size=4))
    async with (
        running(runner) as engine,
        engine.open(request((1,) * 4, 12)) as old,
        engine.open(request((2,) * 4, 12)) as young,
    ):
        while engine.stats.preemptions == 0:
            runner.gate.release()
            await trio.lowlevel.checkpoint()
            await runner.in_step()
        assert (engine.stats.running, engine.stats.waiting) == (1, 1)
        young.close()
        assert (engine.stats.running, engine.stats.waiting) == (1, 0)
        runner.open_gate()
        assert [event.token async for event in old] == expected((1,) * 4, 12)


async def test_leaving_while_a_step_runs_gives_back_at_its_commit():
    runner = GatedRunner()
    async with running(runner) as engine:
        async with engine.open(request()):
            await runner.in_step()
        assert engine.stats.running == 1
        runner.open_gate()
        await engine.drained()
        assert engine.stats.running == 0
        assert engine.stats.steps == 1


async def test_leaving_while_waiting_gives_back_at_once():
    runner = GatedRunner(capacity(num_slots=1))
    async with running(runner) as engine, engine.open(request(max_tokens=1)) as first:
        await runner.in_step()
        async with engine.open(request()):
            assert engine.stats.waiting == 1
        assert engine.stats.waiting == 0
        runner.open_gate()
        await first.wait()


async def test_next_step_runs_while_events_are_delivered():
    runner = GatedRunner()
    next_step_had_begun: list[bool] = []

    def sink(event: TokenEvent) -> None:
        if event.finish is None:
            next_step_had_begun.append(runner.entered.acquire(timeout=10))
            runner.gate.release()

    async with running(runner) as engine, engine.open(request(max_tokens=3), sink) as stream:
        await runner.in_step()
        runner.gate.release()
        await stream.wait()
    assert next_step_had_begun == [True, True]


async def test_sink_may_close_its_stream():
    got: list[TokenEvent] = []
    async with running(ScriptedRunner()) as engine:

        def sink(event: TokenEvent) -> None:
            got.append(event)
            if len(got) == 3:
                stream.close()

        async with engine.open(request(max_tokens=500), sink) as stream:
            last = await stream.wait()
        assert last.finish is FinishReason.ABORT
        await engine.drained()
        assert [event.token for event in got] == expected((1, 2, 3), 3)


async def test_sink_may_close_another_stream():
    runner = GatedRunner()
    late: list[TokenEvent] = []
    async with running(runner) as engine, contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(engine.open(request((9,), 1), lambda _: None))
        await runner.in_step()
        first = await stack.enter_async_context(
            engine.open(request((1,), 9), lambda _: second.close())
        )
        second = await stack.enter_async_context(engine.open(request((2,), 9), late.append))
        runner.open_gate()
        assert (await first.wait()).finish is FinishReason.LENGTH
        assert late == []


async def test_raising_sink_ends_only_its_own_request(caplog):
    def sink(event: TokenEvent) -> None:
        raise KeyError("my sink")

    async with running(ScriptedRunner()) as engine:
        async with (
            engine.open(request(max_tokens=50), sink) as bad,
            engine.open(request((7,), 10)) as good,
        ):
            last = await bad.wait()
            assert last.finish is FinishReason.ERROR
            assert last.error is not None
            assert "my sink" in last.error
            assert [event.token async for event in good] == expected((7,), 10)
        assert engine.stats.healthy
    assert "the sink of a request raised" in caplog.text


async def test_close_ends_iteration():
    async with running(ScriptedRunner()) as engine, engine.open(request(max_tokens=500)) as stream:
        tokens = []
        async for event in stream:
            tokens.append(event.token)
            if len(tokens) == 2:
                stream.close()
        assert tokens == expected((1, 2, 3), 2)
        stream.close()
        assert (await stream.wait()).finish is FinishReason.ABORT


async def test_failed_step_costs_its_own_requests_and_health_tells(caplog):
    runner = GatedRunner(fail_steps={0})
    async with running(runner, EngineConfig(chunked_prefill_size=3)) as engine:
        async with engine.open(request()) as hit, engine.open(request((4, 5))) as spared:
            await runner.in_step()
            runner.gate.release()
            (event,) = await collect(hit)
            assert event.finish is FinishReason.ERROR
            assert event.error == "the model step failed: RuntimeError: scripted failure"
            stats = engine.stats
            assert (stats.healthy, stats.error, stats.failed_steps) == (False, event.error, 1)
            runner.open_gate()
            assert [event.token async for event in spared] == expected((4, 5), 4)
        assert engine.stats.healthy
        assert engine.stats.error is None
    assert "scripted failure" in caplog.text


async def test_short_answer_of_the_runner_is_a_failed_step():
    class Mute(ScriptedRunner):
        def step(self, plan: StepPlan) -> StepResult:
            return StepResult((), 0.0)

    async with running(Mute()) as engine, engine.open(request()) as stream:
        last = await stream.wait()
        assert last.error == "the model step failed: 0 answers to 1 chunks"
        assert not engine.stats.healthy


async def test_queue_full_and_request_too_large():
    runner = GatedRunner(capacity(num_slots=1))
    async with (
        running(runner, EngineConfig(max_queued_requests=1)) as engine,
        engine.open(request()) as first,
        engine.open(request()) as second,
    ):
        with pytest.raises(QueueFull) as full:
            await open_and_close(engine, request())
        assert full.value.retry_after >= 1.0
        with pytest.raises(RequestTooLarge):
            await open_and_close(engine, request(range(2000)))
        runner.open_gate()
        await first.wait()
        await second.wait()


async def test_drain_refuses_new_requests_and_lets_the_others_finish():
    runner = GatedRunner(capacity(num_slots=1))
    async with (
        running(runner) as engine,
        engine.open(request()) as first,
        engine.open(request((8,), 3)) as waiting,
    ):
        engine.begin_drain()
        with pytest.raises(EngineClosed, match="shuts down"):
            await open_and_close(engine, request())
        runner.open_gate()
        await engine.drained()
        assert [event.token async for event in first] == expected((1, 2, 3), 4)
        assert [event.token async for event in waiting] == expected((8,), 3)


async def test_requests_opened_before_the_start_wait_for_it():
    engine = Engine(ScriptedRunner(), EngineConfig())
    assert not engine.stats.healthy
    with trio.fail_after(10):
        async with engine.open(request()) as stream, trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            assert (await stream.wait()).finish is FinishReason.LENGTH
            nursery.cancel_scope.cancel()


async def test_cancelled_engine_ends_every_stream_and_joins_its_thread():
    runner = ScriptedRunner(capacity(num_slots=2), delay=0.002)
    engine = Engine(runner, EngineConfig())
    got: list[TokenEvent] = []
    with trio.fail_after(10):
        async with contextlib.AsyncExitStack() as stack:
            streams = [
                await stack.enter_async_context(engine.open(request((n,), 900), got.append))
                for n in range(4)
            ]
            async with trio.open_nursery() as nursery:
                await nursery.start(engine.run)
                while len(got) < 10:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            steps = runner.num_steps
            for stream in streams:
                last = await stream.wait()
                assert (last.finish, last.error) == (FinishReason.ERROR, "the engine was stopped")
        assert_nothing_left(engine)
        await trio.testing.wait_all_tasks_blocked()
        assert runner.num_steps == steps
        assert not engine.stats.healthy
        with pytest.raises(EngineClosed, match="stopped"):
            await open_and_close(engine, request())
        with pytest.raises(RuntimeError, match="runs once"):
            await engine.run()


@pytest.mark.parametrize("method", ["plan", "commit"])
async def test_broken_bookkeeping_ends_all_streams_and_the_run(monkeypatch, method, caplog):
    runner = GatedRunner(capacity(num_slots=1))
    engine = Engine(runner, EngineConfig())

    def broken(*_):
        raise ZeroDivisionError("bug")

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            async with engine.open(request()) as first, engine.open(request()) as second:
                await runner.in_step()
                monkeypatch.setattr(f"kttrio.engine.scheduler.Scheduler.{method}", broken)
                runner.open_gate()
                for stream in (first, second):
                    last = await stream.wait()
                    assert last.error == "the engine died: ZeroDivisionError: bug"
                await engine.drained()

    with trio.fail_after(10):
        with pytest.raises(ExceptionGroup) as raised:
            await scenario()
        assert raised.group_contains(ZeroDivisionError, match="bug")
        with pytest.raises(EngineClosed, match="died"):
            await open_and_close(engine, request())
    stats: EngineStats = engine.stats
    assert not stats.healthy
    assert stats.error == "the engine died: ZeroDivisionError: bug"
    assert any(record.levelno == logging.CRITICAL for record in caplog.records)


@pytest.mark.parametrize("method", ["plan", "abort"])
async def test_bug_outside_a_step_kills_the_engine_too(monkeypatch, method, caplog):
    engine = Engine(ScriptedRunner(), EngineConfig())

    def broken(*_):
        raise ZeroDivisionError("bug")

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            monkeypatch.setattr(f"kttrio.engine.scheduler.Scheduler.{method}", broken)
            async with engine.open(request(max_tokens=900)) as stream:
                if method == "plan":
                    assert (await stream.wait()).finish is FinishReason.ERROR

    with trio.fail_after(10), pytest.raises(ExceptionGroup) as raised:
        await scenario()
    assert raised.group_contains(ZeroDivisionError)


async def test_thread_that_dies_ends_all_streams_and_the_run():
    class Death(BaseException):
        pass

    runner = ScriptedRunner(fail_steps={2}, failure=Death())
    engine = Engine(runner, EngineConfig())
    lasts = []

    async def client() -> None:
        async with engine.open(request(max_tokens=100)) as stream:
            with trio.CancelScope(shield=True):
                lasts.append(await stream.wait())

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            nursery.start_soon(client)

    with trio.fail_after(10), pytest.raises(BaseExceptionGroup) as raised:
        await scenario()
    assert raised.group_contains(Death)
    assert [last.finish for last in lasts] == [FinishReason.ERROR]
    assert not engine.stats.healthy


async def test_logprobs_pass_through():
    async with running(ScriptedRunner()) as engine:
        asked = request((5, 6, 7), 2, logprobs=2, prompt_logprobs=0)
        async with engine.open(asked) as stream:
            first, second = await collect(stream)
        assert first.logprob is not None
        assert first.logprob.token == first.token
        assert len(first.logprob.top) == 2
        assert first.prompt_logprobs is not None
        assert [score.token for score in first.prompt_logprobs if score] == [6, 7]
        assert second.prompt_logprobs is None


async def test_cancelled_consumer_leaves_by_the_door():
    runner = GatedRunner()
    async with running(runner) as engine:
        with trio.CancelScope() as scope:
            async with engine.open(request()) as stream:
                await runner.in_step()
                scope.cancel()
                await collect(stream)
        assert scope.cancelled_caught
        runner.open_gate()
