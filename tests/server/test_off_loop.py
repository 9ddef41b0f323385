"""Long work goes to threads, of which there are few."""

from __future__ import annotations

from functools import partial
from threading import get_ident

import pytest
import trio
import trio.lowlevel
import trio.testing

from kttrio.server import off_loop as module
from kttrio.server.errors import ApiError
from kttrio.server.off_loop import HUGE_BODY, LONG_BODY, MOST_HUGE, MOST_LONG, off_loop


@pytest.mark.parametrize(("num_bytes", "is_here"), [(LONG_BODY - 1, True), (LONG_BODY, False)])
async def test_long_work_leaves_the_loop(num_bytes: int, is_here: bool) -> None:
    assert (await off_loop(num_bytes, get_ident) == get_ident()) is is_here


@pytest.mark.parametrize(("num_bytes", "most"), [(LONG_BODY, MOST_LONG), (HUGE_BODY, MOST_HUGE)])
async def test_few_are_worked_on_at_once(num_bytes: int, most: int) -> None:
    gate, running = trio.Event(), []

    def work() -> None:
        running.append(None)
        trio.from_thread.run(gate.wait)

    async with trio.open_nursery() as nursery:
        for _ in range(most + 3):
            nursery.start_soon(off_loop, num_bytes, work)
        while len(running) < most:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        assert len(running) == most
        gate.set()
    assert len(running) == most + 3


async def test_huge_work_does_not_hold_up_long_work() -> None:
    gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(off_loop, HUGE_BODY, lambda: trio.from_thread.run(gate.wait))
        await trio.testing.wait_all_tasks_blocked()
        assert await off_loop(LONG_BODY, lambda: "done") == "done"
        gate.set()


async def test_few_huge_bodies_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 1)
    gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(MOST_HUGE + 1):
            nursery.start_soon(off_loop, HUGE_BODY, lambda: trio.from_thread.run(gate.wait))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ApiError, match="wait already") as caught:
            await off_loop(HUGE_BODY, get_ident)
        nursery.start_soon(partial(off_loop, HUGE_BODY, get_ident, patient=True))
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert caught.value.status == 429
    assert caught.value.headers == {"Retry-After": "5"}
    assert await off_loop(HUGE_BODY, lambda: "done") == "done"
