"""However a listener fails, its request ends, its client learns of it, and nothing is left."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import h11
import pytest
import trio

from kttrio.config import ServerConfig
from kttrio.server.anthropic.response import MessageStream
from kttrio.server.completion import Collector
from kttrio.server.grpc import inference as grpc_inference
from kttrio.server.openai.response import ChatStream, TextStream
from kttrio.server.responses.stream import ResponsesStream
from kttrio.server.triton.response import GenerateStream
from tests.http2_client import INFERENCE, http2_client, infer_request
from tests.http_front import MODEL, Front, Reply, running_front

HI = [{"role": "user", "content": "Hi"}]
TOLD = "failed to write the answer"


@dataclass(frozen=True)
class Streamed:
    """A protocol's streams: who listens, and where its errors have their message."""

    listener: type
    path: str
    body: dict[str, object]
    message: Callable[[Any], object] = lambda event: event["error"]["message"]


STREAMS = {
    "chat": Streamed(ChatStream, "/v1/chat/completions", {"messages": HI}),
    "text": Streamed(TextStream, "/v1/completions", {"prompt": "Hi"}),
    "responses": Streamed(
        ResponsesStream,
        "/v1/responses",
        {"input": "Hi"},
        lambda event: event["response"]["error"]["message"],
    ),
    "messages": Streamed(MessageStream, "/v1/messages", {"messages": HI, "max_tokens": 9}),
    "generate": Streamed(
        GenerateStream,
        f"/v2/models/{MODEL}/generate_stream",
        {"text_input": "Hi"},
        lambda event: event["error"],
    ),
}


class Broken:
    """A method that raises the first `times` times that it is called, or always."""

    def __init__(self, owner: type, name: str, times: int | None) -> None:
        self._method = getattr(owner, name)
        self._times = times
        self.num_calls = 0

    def __get__(self, listener: object, owner: type) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            self.num_calls += 1
            if self._times is None or self.num_calls <= self._times:
                raise RuntimeError("broken")
            self._method(listener, *arguments)

        return call


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    """Whatever happens: no request stays, and the engine has all its pages back."""
    async with running_front(config=ServerConfig(grpc_port=0)) as running:
        yield running
        await running.idle()
        stats = running.state.engine.stats
        assert (stats.free_pages, stats.free_slots) == (stats.num_pages, stats.num_slots)
        assert running.state.meter.ends == {"error": 1}


def last_event(reply: Reply) -> Any:
    last = reply.body.decode().strip().split("\n\n")[-1]
    return json.loads(last.split("data: ")[-1])


@pytest.mark.parametrize("protocol", STREAMS)
@pytest.mark.parametrize("method", ["on_end", "on_delta"])
async def test_a_listener_that_fails_tells_so(
    front: Front, protocol: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that fails at the very end, when every choice is finished."""
    streamed = STREAMS[protocol]
    monkeypatch.setattr(streamed.listener, method, Broken(streamed.listener, method, 1))
    reply = await front.ask("POST", streamed.path, {**streamed.body, "stream": True})
    if reply.status != 200:  # a patient stream has not begun
        assert (protocol, method, reply.status) == ("generate", "on_delta", 500)
    assert TOLD in str(streamed.message(last_event(reply)))
    assert b"[DONE]" not in reply.body


@pytest.mark.parametrize("protocol", STREAMS)
async def test_one_that_cannot_even_tell_so_is_cut_off(
    front: Front, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = STREAMS[protocol]
    monkeypatch.setattr(streamed.listener, "on_end", Broken(streamed.listener, "on_end", None))
    with pytest.raises((h11.RemoteProtocolError, trio.BrokenResourceError)):
        await front.ask("POST", streamed.path, {**streamed.body, "stream": True})


@pytest.mark.parametrize("times", [1, None])
@pytest.mark.parametrize("method", ["on_end", "on_delta"])
async def test_over_grpc_the_call_goes_on(
    front: Front, method: str, times: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the request whose listener fails has an error."""
    listener = grpc_inference.Responses
    monkeypatch.setattr(listener, method, Broken(listener, method, times))
    async with http2_client(front) as client:
        request = infer_request("Hi", stream=True).SerializeToString()
        answer = await client.call(f"{INFERENCE}/ModelStreamInfer", request)
    responses = answer.messages("ModelStreamInferResponse")
    assert answer.status == 0
    assert TOLD in responses[-1].error_message
    assert responses[-1].infer_response.parameters["triton_final_response"].bool_param


@pytest.mark.parametrize("protocol", STREAMS)
async def test_a_whole_answer_that_cannot_be_put_together_is_a_500(
    front: Front, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Collector, "on_end", Broken(Collector, "on_end", None))
    streamed = STREAMS[protocol]
    reply = await front.ask("POST", streamed.path.removesuffix("_stream"), streamed.body)
    assert reply.status == 500
    assert TOLD in reply.body.decode()


async def test_a_drain_is_spared_a_listener_that_fails(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server tells every stream that it ends; one that fails must not keep it from others."""
    monkeypatch.setattr(ChatStream, "on_end", Broken(ChatStream, "on_end", 1))
    front.script.endless = True
    client = await front.connect()
    async with client.stream:
        await client.send("POST", "/v1/chat/completions", {"messages": HI, "stream": True})
        await client.begin()
        front.state.finish_streams("The server is shutting down.")
        reply = await client.receive()
    assert TOLD in last_event(reply)["error"]["message"]
