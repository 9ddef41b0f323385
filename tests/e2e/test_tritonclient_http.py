"""`tritonclient.http` against a running server: all that it can ask, unchanged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import tritonclient.http as http
import tritonclient.http.aio as aio
from tritonclient.utils import InferenceServerException

from tests.e2e.conftest import Server

QUESTION = "<|im_start|>user\nWhat is kttrio?<|im_end|>\n<|im_start|>assistant\n"
DTYPES: dict[str, Any] = {
    "BYTES": np.object_,
    "INT32": np.int32,
    "FP32": np.float32,
    "BOOL": np.bool_,
    "UINT64": np.uint64,
}


def tensor(name: str, datatype: str, values: list[Any], *, binary: bool = True) -> http.InferInput:
    array = np.array(values, dtype=DTYPES[datatype])
    found = http.InferInput(name, list(array.shape), datatype)
    return found.set_data_from_numpy(array, binary_data=binary)


def asked(*, binary: bool = True) -> list[http.InferInput]:
    """The question that the demo model knows, greedily, in the shapes of TensorRT-LLM's clients."""
    return [
        tensor("text_input", "BYTES", [[QUESTION.encode()]], binary=binary),
        tensor("max_tokens", "INT32", [[60]], binary=binary),
        tensor("temperature", "FP32", [[0.0]], binary=binary),
        tensor("exclude_input_in_output", "BOOL", [[True]], binary=binary),
    ]


@pytest.fixture(scope="module")
def triton(server: Server) -> Iterator[http.InferenceServerClient]:
    with http.InferenceServerClient(server.url.removeprefix("http://"), concurrency=4) as client:
        yield client


@pytest.fixture(scope="module")
def answer(client: openai.OpenAI, model: str) -> str:
    """What the same model says over OpenAI's API."""
    question = [{"role": "user", "content": "What is kttrio?"}]
    told = client.chat.completions.create(
        model=model, messages=question, temperature=0, max_tokens=60
    )
    assert told.choices[0].message.content
    return told.choices[0].message.content


def text(result: http.InferResult) -> str:
    (found,) = result.as_numpy("text_output")
    return found.decode() if isinstance(found, bytes) else found


def test_health(triton: http.InferenceServerClient, model: str) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready(model)
    assert triton.is_model_ready(model, "1")
    assert not triton.is_model_ready(model, "2")
    assert not triton.is_model_ready("no such/model %2F")


def test_descriptions(triton: http.InferenceServerClient, model: str) -> None:
    assert triton.get_server_metadata()["name"] == "kttrio"
    told = triton.get_model_metadata(model)
    assert {"text_input", "stream", "sampling_parameters"} <= {
        one["name"] for one in told["inputs"]
    }
    assert triton.get_model_metadata(model, "1") == told
    config = triton.get_model_config(model, "1")
    assert config["model_transaction_policy"] == {"decoupled": True}
    (entry,) = triton.get_model_repository_index()
    assert (entry["name"], entry["state"]) == (model, "READY")


@pytest.mark.parametrize("algorithm", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_infer(
    triton: http.InferenceServerClient, model: str, answer: str, binary: bool, algorithm: str | None
) -> None:
    result = triton.infer(
        model,
        asked(binary=binary),
        outputs=[http.InferRequestedOutput("text_output", binary_data=binary)],
        request_id="a7",
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert text(result) == answer
    assert result.get_response()["id"] == "a7"
    assert ("data" in result.get_output("text_output")) is not binary


def test_all_outputs_in_their_order(
    triton: http.InferenceServerClient, model: str, answer: str
) -> None:
    names = ["finish_reason", "num_output_tokens", "text_output", "cumulative_logprob"]
    wanted = [
        http.InferRequestedOutput(name, binary_data=i % 2 == 0) for i, name in enumerate(names)
    ]
    result = triton.infer(model, asked(), model_version="1", outputs=wanted)
    assert [one["name"] for one in result.get_response()["outputs"]] == names
    assert text(result) == answer
    assert result.as_numpy("finish_reason")[0] == b"stop"
    (score,) = result.as_numpy("cumulative_logprob")
    assert score.dtype == np.float32
    assert -60 < score < 0
    assert result.as_numpy("num_output_tokens").dtype == np.uint32


def test_vllm_style_sampling_parameters(
    triton: http.InferenceServerClient, model: str, answer: str
) -> None:
    sampling = json.dumps({"temperature": "0", "max_tokens": "60", "n": 2})
    inputs = [
        tensor("text_input", "BYTES", [QUESTION.encode()]),
        tensor("stream", "BOOL", [False]),
        tensor("sampling_parameters", "BYTES", [sampling.encode()]),
        tensor("return_finish_reason", "BOOL", [True]),
    ]
    result = triton.infer(model, inputs)
    texts = [found.decode() for found in result.as_numpy("text_output")]
    assert texts == [QUESTION + answer] * 2
    assert list(result.as_numpy("finish_reason")) == [b"stop", b"stop"]


def test_many_at_once(triton: http.InferenceServerClient, model: str, answer: str) -> None:
    running = [triton.async_infer(model, asked(), request_id=str(i)) for i in range(4)]
    results = [one.get_result() for one in running]
    assert [text(result) for result in results] == [answer] * 4
    assert [result.get_response()["id"] for result in results] == list("0123")


def test_the_client_for_asyncio(server: Server, model: str, answer: str) -> None:
    async def ask() -> http.InferResult:
        async with aio.InferenceServerClient(server.url.removeprefix("http://")) as client:
            assert await client.is_model_ready(model)
            return await client.infer(model, asked(), response_compression_algorithm="gzip")

    assert text(asyncio.run(ask())) == answer


def test_statistics_grow(triton: http.InferenceServerClient, model: str) -> None:
    def count() -> int:
        (told,) = triton.get_inference_statistics(model, "1")["model_stats"]
        assert told["inference_stats"]["success"]["count"] == told["inference_count"]
        return told["inference_count"]

    before = count()
    triton.infer(model, asked())
    assert count() == before + 1
    assert triton.get_inference_statistics()["model_stats"][0]["name"] == model


def refusal(call: Any, *args: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        call(*args)
    return caught.value.status(), caught.value.message()


def test_refusals_arrive_as_words(triton: http.InferenceServerClient, model: str) -> None:
    status, message = refusal(triton.infer, "other", asked())
    assert (status, message[:43]) == ("404", "Request for unknown model: 'other' is not f")
    beams = [*asked(), tensor("beam_width", "INT32", [4])]
    assert refusal(triton.infer, model, beams)[0] == "400"
    shared = http.InferInput("text_input", [1], "BYTES")
    shared.set_shared_memory("region", 8)
    assert "shares no memory" in refusal(triton.infer, model, [shared])[1]
    assert refusal(triton.load_model, model)[0] == "400"
    assert refusal(triton.unload_model, model)[0] == "400"
    for call in (
        triton.get_trace_settings,
        triton.get_log_settings,
        triton.get_system_shared_memory_status,
        triton.get_cuda_shared_memory_status,
    ):
        assert refusal(call)[0] == "404"


def test_a_guide_holds_the_answer(triton: http.InferenceServerClient, model: str) -> None:
    inputs = [
        *asked(),
        tensor("guided_decoding_guide_type", "BYTES", [b"regex"]),
        tensor("guided_decoding_guide", "BYTES", [b"(yes|no), [0-9]{3}"]),
    ]
    found = text(triton.infer(model, inputs))
    word, digits = found.split(", ")
    assert word in ("yes", "no")
    assert digits.isdigit()
    assert len(digits) == 3
