"""The soak finds what it looks for: wrong answers, leaks, growing memory."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from kttrio.client import Client, ClientError, StatusError
from kttrio.config import ServerConfig
from tests.http_front import ANSWER, MODEL, Front, running_front
from tools.demo_server import Server, faults
from tools.soak import talkers
from tools.soak.questions import Question
from tools.soak.talkers import Tally, Topic, talk, topics
from tools.soak.trouble import Victim, abort, bad_bodies, crowd, garbage, gzip_bomb, huge_head
from tools.soak.watch import Sample, growth, leaks, look
from tools.soak.ways import ways

USER = ({"role": "user", "content": "Hi"},)
QUESTIONS = (
    Question(name="talk", max_tokens=64, messages=USER),
    Question(name="prompt", max_tokens=64, prompt="Hi"),
)
WAYS = {
    *("chat", "chat, whole", "completions", "responses", "messages"),
    *("generate_stream", "infer", "ModelStreamInfer"),
}
SAMPLE = Sample(0.0, 100.0, 5, 9, 16, 0, 0, 0, {})


def server(front: Front) -> Server:
    assert front.grpc is not None
    return Server(os.getpid(), front.url, front.grpc)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talkers, "SLOW_PIECE", 0.0)
    monkeypatch.setattr(talkers, "BUSY_PAUSE", 0.0)


async def test_every_way_is_asked_and_says_the_same() -> None:
    async with running_front(config=ServerConfig(grpc_port=0)) as front:
        known = await topics(server(front), ways(MODEL), QUESTIONS)
        assert {topic.way for topic in known} == WAYS
        assert {topic.expected for topic in known} == {ANSWER}


async def test_talkers_find_what_is_wrong_and_nothing_else(quick: None) -> None:
    async with running_front(config=ServerConfig(grpc_port=0)) as front:
        known = [
            topic
            for topic in await topics(server(front), ways(MODEL), QUESTIONS)
            if topic.way == "chat"
        ]
        for expected, is_right in ((ANSWER, True), ("Grüße! " * 9, False)):
            tally = Tally()
            wanted = [replace(topic, expected=expected) for topic in known]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(talk, front.url, wanted, random.Random(1), tally)
                while tally.outcomes.total() < 5:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            assert (not tally.findings) is is_right, tally


def asking(outcome: str | Exception) -> Callable[[Client, str, int], Awaitable[str]]:
    async def ask(client: Client, manner: str, num_pieces: int) -> str:
        await trio.lowlevel.checkpoint()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return ask


@pytest.mark.parametrize(
    ("outcome", "manner", "noted"),
    [
        ("Grü", "vanishes", "way: right, client vanishes"),
        ("Gra", "vanishes", "!wrong"),
        ("Grü", "listens", "!wrong"),
        (StatusError(429, "full", {}), "listens", "busy (429)"),
        (StatusError(500, "oh", {}), "listens", "!refused"),
        (ClientError("cut"), "listens", "!broken"),
    ],
)
async def test_what_is_noted(
    outcome: str | Exception, manner: str, noted: str, quick: None
) -> None:
    tally = Tally()
    topic = Topic("way", QUESTIONS[0], asking(outcome), "Grüße")
    await talkers.compare(Client("http://127.0.0.1:1"), topic, manner, 1, tally)
    assert list(tally.outcomes) == [noted]
    assert bool(tally.findings) is noted.startswith("!")


@pytest.mark.parametrize("trouble", [bad_bodies, gzip_bomb, huge_head, garbage, crowd, abort])
async def test_trouble_finds_no_fault_with_a_good_server(
    trouble: Callable[[Victim, random.Random], Awaitable[str]],
) -> None:
    config = ServerConfig(grpc_port=0, max_body_bytes=1 << 21, idle_timeout=1, header_timeout=1)
    async with running_front(config=config, context_length=512) as front:
        where = server(front)
        victim = Victim(front.url, where.port, where.grpc_port, MODEL)
        outcome = await trouble(victim, random.Random(1))
        assert outcome
        assert not outcome.startswith("!")


async def test_a_look_tells_what_is_held() -> None:
    async with running_front() as front, Client(front.url) as client:
        found = await look(client, os.getpid(), trio.current_time())
    assert (found.requests, found.pages, found.slots, found.failed) == (0, 0, 0, {})
    assert found.rss_mib > 10
    assert found.threads >= 1
    assert found.files > 3
    assert found.tasks > 3


def test_leaks_are_what_is_held_in_the_end_and_was_not() -> None:
    assert leaks(SAMPLE, replace(SAMPLE, threads=4)) == {}
    assert leaks(SAMPLE, replace(SAMPLE, pages=2, tasks=17)) == {"pages": 2, "tasks": 1}


def test_growth_compares_the_first_third_with_the_last() -> None:
    steady = [replace(SAMPLE, rss_mib=100 + (i % 3) * 50) for i in range(30)]
    assert growth(steady) == {"least": 0.0, "middle": 0.0, "peak": 0.0}
    rising = [replace(SAMPLE, rss_mib=100 + i) for i in range(30)]
    assert growth(rising)["least"] == 0.2
    assert growth(rising[:20]) == {}


def test_faults_are_lines_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("12:00 INFO all is well\n12:01 ERROR kttrio: it is not\n")
    assert faults(log) == ["12:01 ERROR kttrio: it is not"]
