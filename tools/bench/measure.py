"""Streams against an OpenAI-compatible server, and what was felt of them. No printing here."""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from subprocess import PIPE
from typing import Any

import trio

from kttrio.client import Client, ClientError

IDLE_INTERVAL = 0.05
WORDS = ("river", "stone", "window", "garden", "paper", "silver", "morning", "letter", "engine")


@dataclass(frozen=True, slots=True)
class Target:
    """The server, and what every request asks of it."""

    url: str
    model: str
    api_key: str | None = None
    max_tokens: int = 64
    prompt_tokens: int = 64
    temperature: float = 1.0
    ignore_eos: bool = True
    timeout: float = 60.0

    def client(self) -> Client:
        return Client(self.url, api_key=self.api_key, timeout=self.timeout)

    def body(self, dice: random.Random) -> dict[str, Any]:
        """A chat request whose prompt nobody has seen before."""
        text = " ".join(dice.choices(WORDS, k=self.prompt_tokens))
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body


@dataclass(slots=True)
class Stream:
    """One request as its client felt it; times in seconds."""

    started: float
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    vanished: bool = False
    error: str | None = None


@dataclass(slots=True)
class Level:
    """All streams of one concurrency, and /health meanwhile."""

    concurrency: int
    seconds: float = 0.0
    streams: list[Stream] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    health_errors: int = 0

    def errors(self) -> list[str]:
        return [stream.error for stream in self.streams if stream.error is not None]

    def waits(self) -> list[float]:
        """Time to first token of every stream that had one."""
        return [stream.first - stream.started for stream in self.streams if stream.first]

    def gaps(self) -> list[float]:
        return [gap for stream in self.streams for gap in stream.gaps]

    def num_tokens(self) -> int:
        return sum(stream.num_tokens for stream in self.streams)

    def num_vanished(self) -> int:
        return sum(stream.vanished for stream in self.streams)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all values do not exceed; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


async def run_level(
    target: Target,
    concurrency: int,
    num_requests: int,
    *,
    disconnect: float = 0.0,
    seed: int = 0,
    health: bool = True,
) -> Level:
    """`num_requests` streams, `concurrency` at a time; a share of the clients vanishes early."""
    level, dice = Level(concurrency), random.Random(seed)
    plans = iter([(target.body(dice), _vanish_at(dice, disconnect)) for _ in range(num_requests)])
    async with _watched_health(target, level) if health else nullcontext():
        started = time.perf_counter()
        async with trio.open_nursery() as workers:
            for _ in range(min(concurrency, num_requests)):
                workers.start_soon(_work, target, plans, level)
        level.seconds = time.perf_counter() - started
    return level


def _vanish_at(dice: random.Random, disconnect: float) -> float | None:
    """How much of its answer a client waits for, when it is one of those that vanish."""
    return dice.random() if dice.random() < disconnect else None


async def _work(
    target: Target, plans: Iterator[tuple[dict[str, Any], float | None]], level: Level
) -> None:
    async with target.client() as client:
        for body, vanish in plans:
            stream = Stream(time.perf_counter())
            level.streams.append(stream)
            patience = None if vanish is None else round(vanish * target.max_tokens)
            try:
                await _read(client, body, stream, patience)
            except ClientError as error:
                stream.error = str(error)


async def _read(client: Client, body: dict[str, Any], stream: Stream, patience: int | None) -> None:
    async with client.stream("/v1/chat/completions", body) as events:
        while (chunk := await events.chunk()) is not None:
            if patience is not None and len(stream.gaps) >= patience:
                stream.vanished = True
                return
            now = time.perf_counter()
            usage = chunk.get("usage")
            if usage:
                stream.num_prompt_tokens = usage["prompt_tokens"]
                stream.num_tokens = usage["completion_tokens"]
            if not _has_news(chunk):
                continue
            if stream.first is None:
                stream.first = now
            else:
                stream.gaps.append(now - stream.last)
            stream.last = now
            stream.num_tokens += not usage


def _has_news(chunk: dict[str, Any]) -> bool:
    deltas = (choice.get("delta") or {} for choice in chunk.get("choices") or ())
    return any(
        delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls")
        for delta in deltas
    )


@asynccontextmanager
async def _watched_health(target: Target, level: Level) -> AsyncIterator[None]:
    """Ask /health for as long as the block lasts."""
    command = [sys.executable, "-m", "tools.bench.health", target.url]
    process = await trio.lowlevel.open_process(command, stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with process.stdout:
            async with process.stdin:
                yield
            found = json.loads(b"".join([part async for part in process.stdout]))
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
    level.health, level.health_errors = found["seconds"], found["errors"]


async def first_model(url: str, api_key: str | None) -> str:
    """The name of the first model that the server lists."""
    async with Client(url, api_key=api_key) as client:
        listed = await client.get_json("/v1/models")
    return str(listed["data"][0]["id"])


def in_use(info: dict[str, Any]) -> dict[str, int]:
    """What /get_server_info says is taken at this moment."""
    engine = info["engine"]
    return {
        "requests": info["live_requests"] + engine["running"] + engine["waiting"],
        "pages": engine["num_pages"] - engine["free_pages"],
        "slots": engine["num_slots"] - engine["free_slots"],
    }


async def wait_until_idle(target: Target, seconds: float) -> dict[str, Any]:
    """The server's own count of what is in use, as soon as that is nothing, or in the end."""
    async with target.client() as client:
        deadline = trio.current_time() + seconds
        while True:
            info: dict[str, Any] = await client.get_json("/get_server_info")
            if trio.current_time() > deadline or not any(in_use(info).values()):
                return info
            await trio.sleep(IDLE_INTERVAL)
