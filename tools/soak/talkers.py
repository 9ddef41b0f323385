"""Clients that behave, more or less: each answer of theirs is compared with the one expected."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice

import trio

from kttrio.client import Client, ClientError, StatusError
from tools.demo_server import Server
from tools.soak import calls
from tools.soak.questions import Question
from tools.soak.ways import Way

TIMEOUT = 60.0
BUSY = (429, 503)
BUSY_PAUSE = 0.5
SLOW_PIECE = 0.2
MAX_DETAILS = 20
MANNERS = ("listens", "reads slowly", "vanishes")


@dataclass(slots=True)
class Tally:
    """What came of all that was asked and done."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    """What must not be; the first of them."""

    def note(self, outcome: str) -> None:
        self.outcomes[outcome] += 1

    def find(self, kind: str, detail: str) -> None:
        self.note(f"!{kind}")
        if len(self.findings) < MAX_DETAILS:
            self.findings.append(f"{kind}: {detail}")


Ask = Callable[[Client, str, int], Awaitable[str]]
"""Ask in a manner; in that of `vanishes` for so many pieces."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A question, a way to ask it, and the answer."""

    way: str
    question: Question
    ask: Ask
    expected: str

    @property
    def name(self) -> str:
        return f"{self.way}, {self.question.name}"


async def topics(server: Server, ways: Sequence[Way], asked: Sequence[Question]) -> list[Topic]:
    """Everything that can be asked, with the answers of a server that does nothing else. Raises
    ClientError where these are not the same twice, or not in every way."""
    found = []
    async with Client(server.url, timeout=TIMEOUT) as client:
        model = str((await client.get_json("/v1/models"))["data"][0]["id"])
        for question in asked:
            asks = [(way.name, _over_http(way, question)) for way in ways if way.body(question)]
            if calls.can_ask(question):
                asks.append((calls.NAME, _over_grpc(server.grpc, model, question)))
            for name, ask in asks:
                found.append(Topic(name, question, ask, await ask(client, "listens", 0)))
    return found


def _over_http(way: Way, question: Question) -> Ask:
    async def ask(client: Client, manner: str, num_pieces: int) -> str:
        pieces = []
        async with aclosing(way.ask(client, question)) as answer:
            async for piece in answer:
                pieces.append(piece)
                if manner == "vanishes" and len(pieces) >= num_pieces:
                    break
                if manner == "reads slowly":
                    await trio.sleep(SLOW_PIECE)
        return "".join(pieces)

    return ask


def _over_grpc(address: str, model: str, question: Question) -> Ask:
    async def ask(client: Client, manner: str, num_pieces: int) -> str:
        patience = num_pieces if manner == "vanishes" else None
        return await trio.to_thread.run_sync(calls.ask, address, model, question, patience)

    return ask


async def talk(url: str, topics: Sequence[Topic], dice: random.Random, tally: Tally) -> None:
    """Ask one thing after the other, until cancelled."""
    while True:
        async with Client(url, timeout=TIMEOUT) as client:
            for topic in islice(iter(lambda: dice.choice(topics), None), dice.randrange(1, 20)):
                (manner,) = dice.choices(MANNERS, (6, 1, 2))
                await compare(client, topic, manner, dice.randrange(1, 30), tally)


async def compare(client: Client, topic: Topic, manner: str, num_pieces: int, tally: Tally) -> None:
    """Ask once, and note what came of it."""
    try:
        answer = await topic.ask(client, manner, num_pieces)
    except StatusError as error:
        if error.status not in BUSY:
            tally.find("refused", f"{topic.name}: {error}")
            return
        tally.note(f"busy ({error.status})")
        await trio.sleep(BUSY_PAUSE)
        return
    except ClientError as error:
        tally.find("broken", f"{topic.name}: {error}")
        return
    is_right = (
        topic.expected.startswith(answer) if manner == "vanishes" else answer == topic.expected
    )
    if is_right:
        tally.note(f"{topic.way}: right, client {manner}")
    else:
        tally.find("wrong", f"{topic.name}: {answer!r}, not {topic.expected!r}")
