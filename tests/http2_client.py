"""A client of HTTP/2 that does what a test says, also what none should do; and calls of gRPC."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import trio
from hyperframe.frame import GoAwayFrame

from kttrio.server.grpc_messages import MESSAGES
from tests.http_front import MODEL, Front

PREFIX = struct.Struct(">BI")
NOTHING: Mapping[str, str | None] = MappingProxyType({})
INFERENCE = "/inference.GRPCInferenceService"


@dataclass
class Answer:
    """What came on one stream."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    trailers: dict[str, str] = field(default_factory=dict)
    ended: bool = False
    reset: int | None = None
    """The code of the server's RST_STREAM."""

    @property
    def status(self) -> int:
        return int((self.trailers or self.headers)["grpc-status"])

    @property
    def complaint(self) -> str:
        return (self.trailers or self.headers).get("grpc-message", "")

    def messages(self, name: str) -> list[Any]:
        found, rest = [], self.body
        while rest:
            _, length = PREFIX.unpack_from(rest)
            found.append(MESSAGES[name].FromString(rest[PREFIX.size : PREFIX.size + length]))
            rest = rest[PREFIX.size + length :]
        return found


class Http2Client:
    """One connection. `acknowledges`: whether it lets the server send more when it has read."""

    def __init__(self, stream: trio.abc.Stream, *, acknowledges: bool = True) -> None:
        self.stream = stream
        self.engine = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        # h2 would take no further frame after this one.
        self.engine._frame_dispatch_table[GoAwayFrame] = self._note_farewell
        self.engine.initiate_connection()
        self.answers: dict[int, Answer] = {}
        self.farewell: int | None = None
        """The code of the server's GOAWAY."""
        self._acknowledges = acknowledges

    async def flush(self) -> None:
        await self.stream.send_all(self.engine.data_to_send())

    def begin(
        self,
        path: str,
        *fields: tuple[str, str],
        replaced: Mapping[str, str | None] = NOTHING,
        end: bool = False,
    ) -> int:
        """Write a request's head, to be sent with what comes next."""
        number = self.engine.get_next_available_stream_id()
        head = {":method": "POST", ":scheme": "http", ":authority": "test", ":path": path}
        head |= {"te": "trailers", "content-type": "application/grpc", **replaced}
        given = [(name, value) for name, value in head.items() if value is not None]
        self.answers[number] = Answer()
        self.engine.send_headers(number, [*given, *fields], end_stream=end)
        return number

    async def open(self, path: str, *fields: tuple[str, str], **how: Any) -> int:
        number = self.begin(path, *fields, **how)
        await self.flush()
        return number

    async def send(self, number: int, data: bytes, *, end: bool = False) -> None:
        """All of `data`, as the server's windows let it through."""
        while data or end:
            window = self.engine.local_flow_control_window(number)
            size = min(len(data), window, self.engine.max_outbound_frame_size)
            if data and not size:
                await self.read()
                continue
            last = size == len(data)
            self.engine.send_data(number, data[:size], end_stream=end and last)
            data, end = data[size:], end and not last
            await self.flush()

    async def send_message(self, number: int, message: bytes, *, end: bool = True) -> None:
        await self.send(number, PREFIX.pack(0, len(message)) + message, end=end)

    async def read(self) -> bool:
        """Take in what comes next; False when the server has closed."""
        try:
            data = await self.stream.receive_some(65536)
        except trio.BrokenResourceError:
            return False
        if not data:
            return False
        for event in self.engine.receive_data(data):
            self._note(event)
        await self.flush()
        return True

    def _note(self, event: Any) -> None:
        answer = self.answers.get(getattr(event, "stream_id", None) or 0, Answer())
        match event:
            case h2.events.ResponseReceived():
                answer.headers = dict(event.headers)
            case h2.events.TrailersReceived():
                answer.trailers = dict(event.headers)
            case h2.events.DataReceived():
                answer.body += event.data
                if self._acknowledges:
                    size = event.flow_controlled_length
                    self.engine.acknowledge_received_data(size, event.stream_id)
            case h2.events.StreamEnded():
                answer.ended = True
            case h2.events.StreamReset():
                answer.reset, answer.ended = int(event.error_code), True

    def _note_farewell(self, frame: GoAwayFrame) -> tuple[list[Any], list[Any]]:
        self.farewell = frame.error_code
        return [], []

    async def answer(self, number: int) -> Answer:
        """The whole answer."""
        while not self.answers[number].ended:
            assert await self.read(), f"the server closed, saying {self.farewell}"
        return self.answers[number]

    async def closed(self) -> int | None:
        """Read until the server closes: what it said last."""
        while await self.read():
            pass
        return self.farewell

    async def call(self, path: str, message: bytes, *fields: tuple[str, str]) -> Answer:
        """A call with one message."""
        number = await self.open(path, *fields)
        await self.send_message(number, message)
        return await self.answer(number)

    async def infer(self, prompt: str = "Hi", **inputs: object) -> Answer:
        """ModelInfer."""
        request = infer_request(prompt, **inputs)
        return await self.call(f"{INFERENCE}/ModelInfer", request.SerializeToString())


def infer_request(prompt: str = "Hi", *, request_id: str = "", **inputs: Any) -> Any:
    """A ModelInferRequest; inputs by name, and their datatypes by their values'."""
    request = MESSAGES["ModelInferRequest"](model_name=MODEL, id=request_id)
    for name, value in {"text_input": prompt, **inputs}.items():
        if isinstance(value, str):
            tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
            tensor.contents.bytes_contents.append(value.encode())
        elif isinstance(value, bool):
            tensor = request.inputs.add(name=name, datatype="BOOL", shape=[1])
            tensor.contents.bool_contents.append(value)
        else:
            tensor = request.inputs.add(name=name, datatype="INT32", shape=[1])
            tensor.contents.int_contents.append(value)
    return request


@asynccontextmanager
async def http2_client(
    front: Front,
    *,
    greets: bool = True,
    acknowledges: bool = True,
    receive_buffer: int | None = None,
) -> AsyncIterator[Http2Client]:
    """A client of the front's gRPC port."""
    assert front.grpc is not None
    port = int(front.grpc.rsplit(":", 1)[1])
    client = await front.connect(port=port, receive_buffer=receive_buffer)
    async with client.stream:
        speaker = Http2Client(client.stream, acknowledges=acknowledges)
        if greets:
            await speaker.flush()
        yield speaker
