"""Triton's own gRPC client against a real server."""

from __future__ import annotations

import json
import queue
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from tritonclient.grpc import (
    InferenceServerClient,
    InferInput,
    InferRequestedOutput,
    InferResult,
    service_pb2,
)
from tritonclient.utils import InferenceServerException

from kttrio.server.grpc.messages import MESSAGES
from tests.e2e.conftest import Server
from tools.bench.measure import in_use
from tools.soak.calls import tensor

SECONDS = 60
PROMPT = "What is kttrio?"


@pytest.fixture
def triton(server: Server) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.grpc) as client:
        yield client


def inputs(prompt: str = PROMPT, **values: object) -> list[InferInput]:
    given = {"text_input": prompt, "temperature": 0, "max_tokens": 8, **values}
    return [tensor(name, value) for name, value in given.items()]


class Stream:
    """One ModelStreamInfer and what comes of it."""

    def __init__(self, client: InferenceServerClient, **settings: Any) -> None:
        self._client = client
        self._came: queue.SimpleQueue[InferResult | Exception] = queue.SimpleQueue()
        client.start_stream(lambda result, error: self._came.put(error or result), **settings)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_stream()

    def next(self) -> InferResult:
        came = self._came.get(timeout=SECONDS)
        if isinstance(came, Exception):
            raise came
        return came

    def answers(self, count: int) -> dict[str, str]:
        """So many whole answers by the ids of their requests."""
        texts: dict[str, str] = {}
        while count:
            result = self.next()
            response = result.get_response()
            (text,) = result.as_numpy("text_output")
            texts[response.id] = texts.get(response.id, "") + text.decode()
            count -= response.parameters["triton_final_response"].bool_param
        return texts


def test_it_tells_what_it_is(triton: InferenceServerClient, model: str) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready(model)
    assert not triton.is_model_ready("other")
    assert triton.get_server_metadata().name == "kttrio"
    metadata = triton.get_model_metadata(model, as_json=True)
    assert {"name": "text_output", "datatype": "BYTES", "shape": ["-1"]} in metadata["outputs"]
    config = triton.get_model_config(model, as_json=True)["config"]
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert triton.get_model_repository_index(as_json=True)["models"][0]["state"] == "READY"
    assert triton.get_inference_statistics(model).model_stats[0].name == model


def test_what_is_not_offered_is_said_so(triton: InferenceServerClient, model: str) -> None:
    for refused in (triton.get_log_settings, triton.get_system_shared_memory_status):
        with pytest.raises(InferenceServerException, match="not offered") as caught:
            refused()
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    with pytest.raises(InferenceServerException, match="while the server runs"):
        triton.unload_model(model)


def test_infer(triton: InferenceServerClient, model: str) -> None:
    outputs = [InferRequestedOutput("text_output"), InferRequestedOutput("sequence_length")]
    result = triton.infer(model, inputs(), request_id="me", outputs=outputs)
    (text,) = result.as_numpy("text_output")
    assert text.decode().startswith(PROMPT)
    assert result.as_numpy("sequence_length").tolist() == [8]
    assert result.get_response().id == "me"


@pytest.mark.parametrize("algorithm", ["gzip", None])
def test_a_big_request_is_read_whole(
    triton: InferenceServerClient, model: str, algorithm: str | None
) -> None:
    """3 MB, which is more than the model takes, but not more than the server."""
    with pytest.raises(InferenceServerException, match="4096 tokens"):
        triton.infer(model, inputs("word " * 600_000), compression_algorithm=algorithm)


def test_errors_have_their_status(triton: InferenceServerClient, model: str) -> None:
    with pytest.raises(InferenceServerException, match="unknown model") as caught:
        triton.infer("other", inputs())
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException, match="max_tokens") as caught:
        triton.infer(model, inputs(max_tokens=-1))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_deadline_ends_a_request(triton: InferenceServerClient, model: str) -> None:
    with pytest.raises(InferenceServerException, match=r"(?i)deadline"):
        triton.infer(model, inputs(max_tokens=2000, ignore_eos=True), client_timeout=0.3)


def test_a_stream_and_the_whole_say_the_same(triton: InferenceServerClient, model: str) -> None:
    whole = triton.infer(model, inputs(exclude_input_in_output=True)).as_numpy("text_output")[0]
    with Stream(triton) as stream:
        for i in range(3):
            triton.async_stream_infer(model, inputs(stream=True), request_id=str(i))
        assert stream.answers(3) == dict.fromkeys("012", whole.decode())


def test_an_error_in_a_stream_leaves_it_open(triton: InferenceServerClient, model: str) -> None:
    with Stream(triton) as stream:
        triton.async_stream_infer("other", inputs(stream=True))
        with pytest.raises(InferenceServerException, match="unknown model"):
            stream.next()
        triton.async_stream_infer(model, inputs(stream=True), request_id="good")
        assert set(stream.answers(1)) == {"good"}


def test_cancelling_a_stream_ends_its_requests(
    triton: InferenceServerClient, model: str, server: Server
) -> None:
    with Stream(triton) as stream:
        for _ in range(4):
            endless = inputs(stream=True, max_tokens=3000, ignore_eos=True)
            triton.async_stream_infer(model, endless)
        stream.next()
        triton.stop_stream(cancel_requests=True)
        wait_until_idle(server)


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{server.url}/get_server_info", timeout=SECONDS) as answer:
            if not any(in_use(json.load(answer)).values()):
                return
        time.sleep(0.1)
    raise AssertionError("requests run on")


def test_many_streams_at_once(server: Server, model: str) -> None:
    def ask(number: int) -> dict[str, str]:
        with InferenceServerClient(server.grpc) as client, Stream(client) as stream:
            client.async_stream_infer(model, inputs(stream=True), request_id=str(number))
            return stream.answers(1)

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, range(32)))
    assert [set(answer) for answer in answers] == [{str(number)} for number in range(32)]
    assert len({text for answer in answers for text in answer.values()}) == 1


def test_grpcs_own_health_check(server: Server) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=MESSAGES["HealthCheckResponse"].FromString,
        )
        assert check(MESSAGES["HealthCheckRequest"](), timeout=SECONDS).status == 1


def test_requests_are_of_the_published_type() -> None:
    """What this client sends is what the tests of the server build by hand."""
    ours = set(MESSAGES["ModelInferRequest"].DESCRIPTOR.fields_by_name)
    assert ours == set(service_pb2.ModelInferRequest.DESCRIPTOR.fields_by_name)
