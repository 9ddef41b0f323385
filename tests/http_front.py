"""The whole front wing on a real loopback port, over a scripted runner, and a client for it."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import h11
import trio
from quart_trio import QuartTrio

from kttrio.config import EngineConfig, ServerConfig
from kttrio.engine.engine import Engine
from kttrio.server import serving
from kttrio.server.app import build_app
from kttrio.server.connection import Connection, Connections
from kttrio.server.grpc_server import GrpcServer
from kttrio.server.served_model import ServedModel
from kttrio.server.state import AppState
from kttrio.text.images import ImageFormat
from kttrio.text.tokenizer import Tokenizer
from tests.fakes import ScriptedRunner, capacity
from tests.tokenizers_fake import make_tiny_tokenizer

MODEL = "tiny"
ANSWER = "Grüße, 東京! All is well 😀."
SECONDS = 20.0
"""No test waits longer for anything."""


@dataclass
class Script:
    """What the runner says: `text`, token by token, then the end token; or endless tokens."""

    tokenizer: Tokenizer
    text: str = ANSWER
    endless: bool = False

    def __call__(self, prompt: tuple[int, ...], i: int) -> int:
        ids = self.tokenizer.encode(self.text)
        if self.endless:
            return ids[i % len(ids)]
        return ids[i] if i < len(ids) else self.end_id

    @property
    def end_id(self) -> int:
        end_id = self.tokenizer.token_id("<|im_end|>")
        assert end_id is not None
        return end_id


@dataclass
class Front:
    """A running front: its parts, and clients of it."""

    url: str
    grpc: str | None
    app: QuartTrio
    state: AppState
    connections: Connections
    runner: ScriptedRunner
    script: Script
    shutdown: trio.Event
    engine_scope: trio.CancelScope
    closed: trio.Event
    clients: list[Client] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def tokenizer(self) -> Tokenizer:
        return self.state.model.tokenizer

    async def connect(
        self, *, port: int | None = None, receive_buffer: int | None = None
    ) -> Client:
        """A new connection, to HTTP's port where no other is given; a small receive buffer makes a
        client that soon stops taking."""
        sock = trio.socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            await sock.connect(("127.0.0.1", port or self.port))
        except OSError:
            sock.close()
            raise
        self.clients.append(Client(trio.SocketStream(sock)))
        return self.clients[-1]

    async def only_connection(self) -> Connection:
        """The server's side of the one client that is connected."""
        while not self.connections.open:
            await trio.lowlevel.checkpoint()
        (connection,) = self.connections.open
        return connection

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        """One request on a connection of its own. `body`: JSON value or bytes."""
        client = await self.connect()
        async with client.stream:
            return await client.ask(method, path, body, **headers)

    async def chat(self, content: str = "Hi", **fields: object) -> Reply:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
        return await self.ask("POST", "/v1/chat/completions", body)

    async def complete(self, prompt: object = "Hi", **fields: object) -> Reply:
        return await self.ask("POST", "/v1/completions", {"prompt": prompt, **fields})

    async def idle(self) -> None:
        """Wait until no request is live and the engine holds nothing."""
        while self.state.live:
            await trio.lowlevel.checkpoint()
        await self.state.engine.drained()


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The events of a stream; `[DONE]` and comments as strings."""
        return list(read_events(self.body))

    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


def read_events(body: bytes) -> Iterator[Any]:
    text = body.decode()
    assert text.endswith("\n\n")
    for event in text[:-2].split("\n\n"):
        data = event.removeprefix("data: ")
        yield json.loads(data) if data.startswith("{") else data


class Client:
    """One HTTP/1.1 connection."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._http = h11.Connection(h11.CLIENT)

    async def send(self, method: str, path: str, body: object = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else encode(body)
        fields = {"Host": "test", "Content-Length": str(len(data))}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [(name.encode(), value.encode()) for name, value in fields.items()]
        request = h11.Request(method=method, target=path, headers=lines)
        wire = self._http.send(request) + self._http.send(h11.Data(data=data))
        await self.stream.send_all(wire + self._http.send(h11.EndOfMessage()))

    async def begin(self) -> None:
        """Wait for the first bytes of the response."""
        self._http.receive_data(await self.stream.receive_some(65536))

    async def next_event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self.stream.receive_some(65536))
        return event

    async def receive(self) -> Reply:
        head = await self.next_event()
        while isinstance(head, h11.InformationalResponse):
            head = await self.next_event()
        body = b""
        while isinstance(event := await self.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage)
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        headers = {name.decode(): value.decode() for name, value in head.headers}
        return Reply(head.status_code, headers, body)

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        await self.send(method, path, body, **headers)
        return await self.receive()

    async def is_closed(self) -> bool:
        """Read to the end: True when the server closes without another byte."""
        try:
            return await self.stream.receive_some(1) == b""
        except trio.BrokenResourceError:
            return True


async def read_all(client: Client) -> bytes:
    """All that the server still sends before it closes."""
    received = b""
    with trio.fail_after(5):
        while data := await client.stream.receive_some(65536):
            received += data
    return received


def encode(value: object) -> bytes:
    return json.dumps(value).encode()


def chat_body(content: str = "Hi", **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def raw_request(body: object, *head: str, version: str = "1.1") -> bytes:
    """A chat request as bytes, with header lines of the test's choice."""
    data = encode(body)
    lines = [f"POST /v1/chat/completions HTTP/{version}", "Host: test", *head]
    lines.append(f"Content-Length: {len(data)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


@asynccontextmanager
async def running_front(
    *,
    config: ServerConfig | None = None,
    engine_config: EngineConfig | None = None,
    delay: float = 0.0,
    num_slots: int = 8,
    fail_steps: tuple[int, ...] = (),
    context_length: int = 1024,
    num_drafts: int = 0,
    write_checkpoint: Callable[[Path], Path] = make_tiny_tokenizer,
    images: ImageFormat | None = None,
) -> AsyncIterator[Front]:
    """Serve for as long as the block lasts; nothing may be left behind at its end."""
    config = replace(config or ServerConfig(), port=0, served_model_name=MODEL)
    with TemporaryDirectory() as directory:
        model = ServedModel.load(write_checkpoint(Path(directory)), config, images=images)
    script = Script(model.tokenizer)
    limits = capacity(
        num_slots=num_slots,
        num_pages=num_slots * context_length // 16,
        context_length=context_length,
        vocab_size=model.tokenizer.vocab_size,
        num_drafts=num_drafts,
    )
    runner = ScriptedRunner(limits, script, delay=delay, fail_steps=fail_steps)
    engine = Engine(runner, engine_config or EngineConfig())
    state = AppState(engine=engine, model=model, config=config, seeds=Random(7))
    app = build_app(state)
    opened: list[Connections] = []

    def open_connections(**settings: Any) -> Connections:
        opened.append(Connections(**settings))
        return opened[0]

    shutdown, closed = trio.Event(), trio.Event()
    opening = patch.object(serving, "Connections", open_connections)
    with trio.fail_after(SECONDS), opening, state.constraints:
        async with trio.open_nursery() as nursery:
            engine_scope = await nursery.start(_run_engine, engine)

            async def listen(*, task_status: trio.TaskStatus[serving.Addresses]) -> None:
                await serving.serve_http(
                    app,
                    config,
                    calls=GrpcServer(state).serve,
                    meter=state.meter,
                    shutdown=shutdown.wait,
                    task_status=task_status,
                )
                closed.set()

            told = await nursery.start(listen)
            front = Front(
                url=told.url,
                grpc=told.grpc,
                app=app,
                state=state,
                connections=opened[0],
                runner=runner,
                script=script,
                shutdown=shutdown,
                engine_scope=engine_scope,
                closed=closed,
            )
            try:
                yield front
            finally:
                for client in front.clients:
                    client.stream.socket.close()
            shutdown.set()
            await closed.wait()
            nursery.cancel_scope.cancel()
    assert runner.violations == []


async def _run_engine(engine: Engine, *, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            task_status.started(scope)
