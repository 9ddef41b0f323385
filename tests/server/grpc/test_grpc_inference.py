"""The inference service over gRPC: what it tells, infers and streams; who may call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from kttrio.config import EngineConfig, ServerConfig
from kttrio.server.grpc import inference as grpc_inference
from kttrio.server.grpc.messages import MESSAGES
from tests.http2_client import INFERENCE, Http2Client, http2_client, infer_request
from tests.http_front import ANSWER, MODEL, Front, running_front

STREAM = f"{INFERENCE}/ModelStreamInfer"


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    async with running_front(config=ServerConfig(grpc_port=0)) as running:
        yield running


@pytest.fixture
async def client(front: Front) -> AsyncIterator[Http2Client]:
    async with http2_client(front) as connected:
        yield connected


async def ask(client: Http2Client, method: str, **fields: Any) -> Any:
    """The response of a method with one message each way."""
    message = MESSAGES[f"{method}Request"](**fields).SerializeToString()
    answer = await client.call(f"{INFERENCE}/{method}", message)
    assert answer.status == 0, answer.complaint
    (response,) = answer.messages(f"{method}Response")
    return response


async def complaint(client: Http2Client, request: Any) -> str:
    answer = await client.call(f"{INFERENCE}/ModelInfer", request.SerializeToString())
    assert answer.status == 3
    return answer.complaint


def text_of(response: Any) -> str:
    assert response.outputs[0].name == "text_output"
    return response.raw_output_contents[0][4:].decode()


async def stream_infer(client: Http2Client, *requests: Any) -> list[Any]:
    """All responses to requests that are sent one behind the other."""
    number = await client.open(STREAM)
    for request in requests:
        await client.send_message(number, request.SerializeToString(), end=False)
    await client.send(number, b"", end=True)
    answer = await client.answer(number)
    assert answer.status == 0, answer.complaint
    return answer.messages("ModelStreamInferResponse")


def is_final(reply: Any) -> bool:
    return bool(reply.infer_response.parameters["triton_final_response"].bool_param)


async def test_it_is_live_and_ready(client: Http2Client) -> None:
    assert (await ask(client, "ServerLive")).live
    assert (await ask(client, "ServerReady")).ready
    assert (await ask(client, "ModelReady", name=MODEL, version="1")).ready
    assert not (await ask(client, "ModelReady", name="other")).ready


async def test_it_tells_what_it_serves(client: Http2Client) -> None:
    server = await ask(client, "ServerMetadata")
    assert server.name == "kttrio"
    assert "statistics" in server.extensions
    model = await ask(client, "ModelMetadata", name=MODEL)
    assert list(model.versions) == ["1"]
    assert model.inputs[0].name == "text_input"
    assert model.outputs[0].datatype == "BYTES"
    config = (await ask(client, "ModelConfig", name=MODEL)).config
    assert config.model_transaction_policy.decoupled
    assert config.input[0].data_type == 13
    assert not config.input[0].optional
    (indexed,) = (await ask(client, "RepositoryIndex")).models
    assert (indexed.name, indexed.state) == (MODEL, "READY")


async def test_statistics_count_requests(client: Http2Client) -> None:
    await client.infer(max_tokens=1)
    for name in (MODEL, ""):
        (stats,) = (await ask(client, "ModelStatistics", name=name)).model_stats
        assert stats.inference_count == stats.inference_stats.success.count == 1
        assert stats.inference_stats.compute_infer.ns > 0


async def test_models_are_neither_loaded_nor_unloaded(client: Http2Client) -> None:
    for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
        answer = await client.call(f"{INFERENCE}/{method}", b"")
        assert answer.status == 3
        assert "while the server runs" in answer.complaint


async def test_other_models_are_unknown(client: Http2Client) -> None:
    for method in ("ModelMetadata", "ModelConfig", "ModelStatistics"):
        message = MESSAGES[f"{method}Request"](name="other").SerializeToString()
        answer = await client.call(f"{INFERENCE}/{method}", message)
        assert (answer.status, "unknown model" in answer.complaint) == (5, True)


async def test_infer_answers_as_a_whole(client: Http2Client) -> None:
    request = infer_request("Hi", max_tokens=50, exclude_input_in_output=True, request_id="me")
    answer = await client.call(f"{INFERENCE}/ModelInfer", request.SerializeToString())
    (response,) = answer.messages("ModelInferResponse")
    assert (response.model_name, response.model_version, response.id) == (MODEL, "1", "me")
    assert text_of(response) == ANSWER


async def test_inputs_may_come_as_raw_bytes_and_as_parameters(client: Http2Client) -> None:
    request = MESSAGES["ModelInferRequest"](model_name=MODEL)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
    request.inputs.add(name="max_tokens", datatype="INT32", shape=[1])
    request.raw_input_contents.extend([b"\2\0\0\0Hi", b"\x32\0\0\0"])
    request.parameters["exclude_input_in_output"].bool_param = True
    request.outputs.add(name="sequence_length")
    request.outputs.add(name="text_output")
    answer = await client.call(f"{INFERENCE}/ModelInfer", request.SerializeToString())
    (response,) = answer.messages("ModelInferResponse")
    assert [output.name for output in response.outputs] == ["sequence_length", "text_output"]
    assert response.raw_output_contents[1][4:].decode() == ANSWER


async def test_what_is_wrong_with_inputs_is_named(client: Http2Client) -> None:
    request = infer_request()
    request.inputs[0].datatype = "TEXT"
    assert "must be one of BOOL" in await complaint(client, request)
    request = infer_request()
    request.inputs[0].shape[:] = [-1]
    assert "numbers from 0 on" in await complaint(client, request)
    request = infer_request()
    request.inputs[0].shape[:] = [2]
    assert "text_input" in await complaint(client, request)
    request = infer_request(max_tokens=5)
    request.inputs[1].datatype = "INT8"
    request.inputs[1].contents.int_contents[0] = 1000
    assert "no INT8" in await complaint(client, request)
    request = infer_request(max_tokens=5)
    request.inputs[1].datatype = "FP16"
    assert "raw_input_contents" in await complaint(client, request)
    request = infer_request()
    request.raw_input_contents.extend([b"", b""])
    assert "1 inputs, but 2" in await complaint(client, request)
    request = infer_request()
    request.inputs[0].parameters["shared_memory_region"].string_param = "mine"
    assert "shared_memory_region" in await complaint(client, request)
    request = infer_request()
    request.outputs.add(name="nothing")
    assert "nothing" in await complaint(client, request)
    assert "no_such_input" in await complaint(client, infer_request(no_such_input=1))


async def test_a_prompt_that_is_too_long_is_refused(client: Http2Client) -> None:
    answer = await client.infer("word " * 5000)
    assert answer.status == 3
    assert "1024 tokens" in answer.complaint


async def test_a_stream_has_a_response_for_each_piece(client: Http2Client) -> None:
    request = infer_request(stream=True, max_tokens=50, request_id="me")
    replies = await stream_infer(client, request)
    assert "".join(text_of(reply.infer_response) for reply in replies) == ANSWER
    assert {reply.infer_response.id for reply in replies} == {"me"}
    assert [is_final(reply) for reply in replies] == [False] * (len(replies) - 1) + [True]
    assert len(replies) > 5


async def test_a_stream_takes_many_requests(client: Http2Client) -> None:
    requests = [
        infer_request(stream=bool(i % 2), max_tokens=50, request_id=f"r{i}") for i in range(20)
    ]
    texts: dict[str, str] = {}
    finals = 0
    for reply in await stream_infer(client, *requests):
        response = reply.infer_response
        texts[response.id] = texts.get(response.id, "") + text_of(response)
        finals += is_final(reply)
    assert finals == 20
    assert {name: text.removeprefix("Hi") for name, text in texts.items()} == {
        f"r{i}": ANSWER for i in range(20)
    }


async def test_errors_in_a_stream_concern_one_request(client: Http2Client) -> None:
    bad = infer_request(stream=True, request_id="bad", no_such_input=1)
    other = infer_request(request_id="other")
    other.model_name = "other"
    good = infer_request(stream=True, max_tokens=50, request_id="good")
    replies = await stream_infer(client, bad, other, good)
    errors = {reply.infer_response.id: reply for reply in replies if reply.error_message}
    assert set(errors) == {"bad", "other"}
    assert "no_such_input" in errors["bad"].error_message
    assert all(map(is_final, errors.values()))
    good_text = [text_of(r.infer_response) for r in replies if r.infer_response.id == "good"]
    assert "".join(good_text) == ANSWER


async def test_a_message_that_is_none_is_answered_in_the_stream(client: Http2Client) -> None:
    number = await client.open(STREAM)
    await client.send_message(number, b"\xff\xff")
    (reply,) = (await client.answer(number)).messages("ModelStreamInferResponse")
    assert "no ModelInferRequest" in reply.error_message


async def test_an_engine_that_fails_is_told_in_the_stream() -> None:
    config = ServerConfig(grpc_port=0)
    async with (
        running_front(config=config, fail_steps=(3, 4, 5, 6)) as front,
        http2_client(front) as client,
    ):
        replies = await stream_infer(client, infer_request(stream=True, max_tokens=50))
        assert replies[-1].error_message
        (stats,) = (await ask(client, "ModelStatistics")).model_stats
        assert stats.inference_stats.fail.count == 1


async def test_a_full_server_says_so() -> None:
    engine = EngineConfig(max_running_requests=1, max_queued_requests=1)
    async with (
        running_front(config=ServerConfig(grpc_port=0), engine_config=engine, delay=0.01) as front,
        http2_client(front) as client,
    ):
        front.script.endless = True
        number = await client.open(STREAM)
        for _ in range(6):
            request = infer_request(stream=True, max_tokens=20)
            await client.send_message(number, request.SerializeToString(), end=False)
        await client.send(number, b"", end=True)
        replies = (await client.answer(number)).messages("ModelStreamInferResponse")
        assert sum(bool(reply.error_message) for reply in replies) == 4
        assert sum(map(is_final, replies)) == 6


async def test_requests_of_a_stream_wait_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_inference, "MAX_RUNNING", 2)
    config = ServerConfig(grpc_port=0)
    async with running_front(config=config, delay=0.001) as front, http2_client(front) as client:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, len(front.state.live))
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            requests = [infer_request(stream=True, max_tokens=5) for _ in range(8)]
            assert sum(map(is_final, await stream_infer(client, *requests))) == 8
            nursery.cancel_scope.cancel()
        assert most == 2


async def test_a_request_that_is_ended_from_outside_has_a_final_response() -> None:
    config = ServerConfig(grpc_port=0)
    async with (
        running_front(config=config, delay=0.005, context_length=8192) as front,
        http2_client(front) as client,
    ):
        front.script.endless = True
        number = await client.open(STREAM)
        request = infer_request(stream=True, max_tokens=5000)
        await client.send_message(number, request.SerializeToString())
        while not client.answers[number].body:
            assert await client.read()
        assert front.state.abort(None) == 1
        replies = (await client.answer(number)).messages("ModelStreamInferResponse")
        assert [is_final(reply) for reply in replies].count(True) == 1
        assert is_final(replies[-1])


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([], 16),
        ([("authorization", "Bearer wrong")], 16),
        ([("authorization", "Bearer sesame")], 0),
        ([("x-api-key", "sesame")], 0),
    ],
)
async def test_nobody_infers_without_the_key(fields: list[tuple[str, str]], status: int) -> None:
    config = ServerConfig(grpc_port=0, api_key=("sesame",))
    async with running_front(config=config) as front, http2_client(front) as client:
        answer = await client.call(f"{INFERENCE}/ServerMetadata", b"", *fields)
        assert answer.status == status
        assert (await ask(client, "ServerLive")).live


async def test_while_it_drains_it_is_live_but_not_ready(front: Front, client: Http2Client) -> None:
    front.state.begin_drain()
    assert (await ask(client, "ServerLive")).live
    assert not (await ask(client, "ServerReady")).ready
    answer = await client.infer()
    assert answer.status == 14


async def test_a_call_is_a_visit_with_an_id(
    front: Front, client: Http2Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    answer = await client.call(f"{INFERENCE}/ServerMetadata", b"", ("x-request-id", "mine-1"))
    assert answer.headers["x-request-id"] == "mine-1"
    message = infer_request(max_tokens=3).SerializeToString()
    answer = await client.call(f"{INFERENCE}/ModelInfer", message, ("x-request-id", "two words"))
    assert answer.headers["x-request-id"].startswith("req-")
    unknown = await client.call("/nowhere", b"")
    await ask(client, "ServerLive")
    lines = [record.message for record in caplog.records if record.name == "kttrio.access"]
    assert len(lines) == 3
    assert "method=gRPC path=/inference.GRPCInferenceService/ServerMetadata status=0" in lines[0]
    assert "request=mine-1" in lines[0]
    assert "completion_tokens=3" in lines[1]
    assert (unknown.status, "path=/nowhere status=12" in lines[2]) == (12, True)
    routes = {(route, status) for _, route, status in front.state.meter.visits}
    assert ("none", 12) in routes
    assert (f"{INFERENCE}/ServerLive", 0) in routes
