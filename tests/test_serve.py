"""The roof over a scripted runner: listening, draining, cutting short, and the engine's death."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from kttrio.client import Client, ClientError, StatusError
from kttrio.config import ConfigError, ModelConfig, RunnerConfig, ServerConfig
from kttrio.plan import StepPlan, StepResult
from kttrio.serve import (
    DEMO_MODEL,
    MemoryLine,
    Parts,
    ServerFailed,
    Settings,
    build_parts,
    load_text,
    serve,
)
from kttrio.server.http2_frames import PREFACE
from tests.fakes import ScriptedRunner, capacity
from tests.tokenizers_fake import make_tiny_tokenizer

SECONDS = 30


class Face:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.url = ""
        self.model = ""
        self.facts: Mapping[str, object] = {}
        self.listens = trio.Event()
        self.drains = trio.Event()
        self.draining_requests: list[int] = []

    def planned(self, memory: Sequence[MemoryLine]) -> None: ...

    def loading(self, done: int, total: int) -> None: ...

    def ready(self, url: str, model: str, facts: Mapping[str, object]) -> None:
        self.url, self.model, self.facts = url, model, facts
        self.listens.set()

    def draining(self, num_requests: int) -> None:
        self.draining_requests.append(num_requests)
        self.drains.set()


class Server:
    """A served runner; `failure` is what `serve` raised in the end."""

    def __init__(self, face: Face) -> None:
        self.face = face
        self.ended = trio.Event()
        self.failure: Exception | None = None

    def client(self) -> Client:
        return Client(self.face.url, timeout=SECONDS)

    @asynccontextmanager
    async def stream(self, num_tokens: int) -> AsyncIterator[Any]:
        """A running stream of which the first token has arrived."""
        body = {
            "model": self.face.model,
            "prompt": "Paris",
            "max_tokens": num_tokens,
            "stream": True,
            "ignore_eos": True,
        }
        async with self.client() as client, client.stream("/v1/completions", body) as events:
            assert await events.chunk()
            yield events


async def rest_of(events: Any) -> str | None:
    """Read to the end; the last finish reason."""
    finish = None
    while (chunk := await events.chunk()) is not None:
        for choice in chunk["choices"]:
            finish = choice["finish_reason"] or finish
    return finish


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return make_tiny_tokenizer(tmp_path / "tiny")


@asynccontextmanager
async def serving(text: Path, runner: ScriptedRunner, **config: Any) -> AsyncIterator[Server]:
    """Serve `runner`; whoever leaves the block has ended the server, or it is cancelled."""
    settings = Settings(
        RunnerConfig(ModelConfig(model=text)), ServerConfig(**{"port": 0, **config})
    )
    server = Server(Face())

    def build(given: Settings, face: object) -> Parts:
        assert given is settings
        assert face is server.face
        return Parts(runner, load_text(given), {"kernels": "scripted"})

    async def run() -> None:
        try:
            await serve(settings, server.face, build=build)
        except Exception as error:
            server.failure = error
        server.ended.set()

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await server.face.listens.wait()
            yield server
            await server.ended.wait()
    assert runner.closed


def slow_runner(**options: Any) -> ScriptedRunner:
    return ScriptedRunner(capacity(vocab_size=500), delay=0.002, **options)


async def test_it_answers_and_ends_when_nobody_is_left(text: Path) -> None:
    async with serving(text, slow_runner()) as server:
        async with server.client() as client:
            listed = await client.get_json("/v1/models")
            info = await client.get_json("/get_server_info")
        assert [entry["id"] for entry in listed["data"]] == ["tiny"]
        assert info["kernels"] == "scripted"
        assert server.face.model == "tiny"
        async with server.stream(5) as events:
            assert await rest_of(events) == "length"
        signal.raise_signal(signal.SIGTERM)
    assert server.failure is None
    assert server.face.draining_requests == [0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_streams_finish_and_refuses_new_ones(text: Path, number: int) -> None:
    async with (
        serving(text, slow_runner()) as server,
        server.stream(200) as events,
        server.client() as idle,
    ):
        await idle.get_json("/health")
        signal.raise_signal(number)
        await server.face.drains.wait()
        with pytest.raises(ClientError):  # 503, or the idle connection is closed already
            await idle.post_json("/v1/completions", {"prompt": "Rome"})
        assert await rest_of(events) == "length"
    assert server.failure is None
    assert server.face.draining_requests == [1]


async def test_the_drain_limit_ends_streams_with_an_error_event(text: Path) -> None:
    async with (
        serving(text, slow_runner(), drain_seconds=0.1) as server,
        server.stream(900) as events,
    ):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(ClientError, match="shutting down"):
            await rest_of(events)
    assert server.failure is None


async def test_a_second_signal_cuts_at_once(text: Path) -> None:
    begun = time.monotonic()
    async with (
        serving(text, slow_runner(), drain_seconds=600) as server,
        server.stream(900) as events,
    ):
        signal.raise_signal(signal.SIGTERM)
        await server.face.drains.wait()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(ClientError):
            await rest_of(events)
    assert isinstance(server.failure, ServerFailed)
    assert "second signal, SIGINT" in str(server.failure)
    assert time.monotonic() - begun < SECONDS / 2


class LyingRunner(ScriptedRunner):
    """Answers some steps with what is no answer, which breaks the engine itself."""

    def step(self, plan: StepPlan) -> StepResult:
        if self.num_steps == 20:
            nonsense: Any = None
            return StepResult((nonsense,) * len(plan.chunks), 0.0)
        return super().step(plan)


async def test_the_engines_death_ends_everything_with_an_error(
    text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner = LyingRunner(capacity(vocab_size=500), delay=0.002)
    async with (
        serving(text, runner) as server,
        server.stream(900) as one,
        server.stream(900) as other,
    ):
        for events in (one, other):
            with pytest.raises(ClientError, match="engine died"):
                await rest_of(events)
    assert isinstance(server.failure, ServerFailed)
    assert "the engine died" in str(server.failure)
    assert "the engine died" in caplog.text


async def test_a_failed_step_costs_its_own_requests_only(
    text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(text, slow_runner(fail_steps={3})) as server:
        async with server.stream(900) as events:
            with pytest.raises(ClientError, match="scripted failure"):
                await rest_of(events)
        async with server.client() as client:
            with pytest.raises(StatusError) as caught:
                await client.get_json("/health")
            assert caught.value.status == 503
            async with server.stream(5) as events:
                assert await rest_of(events) == "length"
            assert (await client.get_json("/health"))["status"] == "ok"
        signal.raise_signal(signal.SIGTERM)
    assert server.failure is None


async def test_a_taken_port_is_refused_before_anything_is_loaded(text: Path) -> None:
    (taken,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = taken.socket.getsockname()[1]
    built = []
    settings = Settings(server=ServerConfig(port=port))
    async with taken:
        with pytest.raises(ConfigError, match=f"--port {port}: cannot listen"):
            await serve(settings, Face(), build=lambda *_: built.append(1))
    assert built == []


async def test_the_grpc_port_is_told_and_drains_with_the_server(text: Path) -> None:
    async with serving(text, slow_runner(), grpc_port=0) as server:
        host, port = str(server.face.facts["grpc"]).split(":")
        stream = await trio.open_tcp_stream(host, int(port))
        async with stream:
            await stream.send_all(PREFACE + b"\0\0\0\x04\0\0\0\0\0")
            assert await stream.receive_some(9)
            signal.raise_signal(signal.SIGTERM)
            while await stream.receive_some(4096):
                pass


async def test_a_certificate_that_cannot_be_used_is_found_before_the_model_is_loaded(
    text: Path,
) -> None:
    settings = Settings(server=ServerConfig(port=0, ssl_certfile=text / "none.pem"))
    with pytest.raises(ConfigError, match="--ssl-certfile"):
        await serve(settings, Face(), build=lambda *_: pytest.fail("it was loaded"))


async def test_what_loading_raises_comes_through(text: Path) -> None:
    def build(settings: Settings, face: object) -> Parts:
        raise ConfigError("--model: no")

    with pytest.raises(ConfigError, match="--model: no"):
        await serve(Settings(server=ServerConfig(port=0)), Face(), build=build)


async def test_nobody_gets_in_without_the_key(text: Path) -> None:
    async with serving(text, slow_runner(), api_key=("sesame",)) as server:
        async with server.client() as client:
            with pytest.raises(StatusError) as caught:
                await client.get_json("/v1/models")
            assert caught.value.status == 401
        signal.raise_signal(signal.SIGTERM)


async def test_a_port_open_to_all_is_named_at_the_start(
    text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(text, slow_runner(), host="0.0.0.0"):
        assert "--host 0.0.0.0 without --api-key" in caplog.text
        signal.raise_signal(signal.SIGTERM)


async def test_origins_are_checked_before_anything_is_read(text: Path) -> None:
    settings = Settings(server=ServerConfig(port=0, allowed_origins=("chat.example",)))
    with pytest.raises(ConfigError, match=r"--allowed-origins: 'chat\.example' is no origin"):
        await serve(settings, Face(), build=lambda *_: pytest.fail("loaded"))


def test_the_demo_model_is_served_under_its_own_name() -> None:
    assert load_text(Settings()).name == "kttrio-demo"
    assert load_text(Settings(server=ServerConfig(served_model_name="other"))).name == "other"


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    """There are not even weights that could be read."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, tmp_path)
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    with pytest.raises(ConfigError, match="has 2048 tokens but the model only 1000"):
        build_parts(Settings(RunnerConfig(ModelConfig(model=tmp_path))), Face())
