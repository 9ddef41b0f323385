"""POST /v2/models/NAME/infer: tensors as JSON, as bytes behind it, compressed, and mutilated."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kttrio.server.errors import BadRequestError
from kttrio.server.triton.request import HEADER_LENGTH, read_infer
from kttrio.server.triton.tensors import BYTES, Tensor, pack, unpack, vector
from tests.http_front import ANSWER, MODEL, Front, Reply, encode, running_front

PATH = f"/v2/models/{MODEL}/infer"
TEXT = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Hi"]}
SHORT = {"name": "max_tokens", "datatype": "INT32", "shape": [1], "data": [1]}
HEAD = {"model_name": MODEL, "model_version": "1"}


async def infer(front: Front, *inputs: Any, **fields: Any) -> Reply:
    return await front.ask("POST", PATH, {"inputs": inputs or [TEXT], **fields})


def outputs(reply: Reply) -> list[dict[str, Any]]:
    """The outputs of an answer in JSON alone."""
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "application/json"
    assert HEADER_LENGTH.lower() not in reply.headers
    found: list[dict[str, Any]] = reply.json()["outputs"]
    return found


def binary_outputs(reply: Reply) -> dict[str, Any]:
    """The values of an answer whose outputs all lie behind its JSON."""
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "application/octet-stream"
    length = int(reply.headers[HEADER_LENGTH.lower()])
    told, rest, found = json.loads(reply.body[:length]), reply.body[length:], {}
    for one in told["outputs"]:
        assert "data" not in one
        size = one["parameters"]["binary_data_size"]
        shape = tuple(one["shape"])
        found[one["name"]] = unpack(one["name"], one["datatype"], shape, rest[:size]).values
        rest = rest[size:]
    assert rest == b""
    return found


def binary_body(tensors: Sequence[Tensor], **fields: Any) -> tuple[bytes, int]:
    """A request with all inputs behind its JSON, and the JSON's length."""
    told = [
        {
            "name": one.name,
            "datatype": one.datatype,
            "shape": list(one.shape),
            "parameters": {"binary_data_size": len(pack(one))},
        }
        for one in tensors
    ]
    head = encode({"inputs": told, **fields})
    return head + b"".join(map(pack, tensors)), len(head)


PROMPT = vector("text_input", BYTES, [b"Hi"])
INPUTS = (PROMPT, vector("max_tokens", "INT32", [50]), Tensor("stream", "BOOL", (1, 1), (False,)))


async def test_json_in_and_out() -> None:
    async with running_front() as front:
        reply = await infer(front, TEXT, {**SHORT, "data": [50]}, id="a7")
        told = {"name": "text_output", "datatype": "BYTES", "shape": [1], "data": ["Hi" + ANSWER]}
        assert reply.json() == {"id": "a7", **HEAD, "outputs": [told]}
        (same,) = outputs(await infer(front, {**TEXT, "shape": [1, 1], "data": [["Hi"]]}, SHORT))
        assert same["data"] == ["Hi" + ANSWER[:5]]
        versioned = f"/v2/models/{MODEL}/versions/1/infer"
        reply = await front.ask("POST", versioned, {"inputs": [TEXT, SHORT]})
        assert outputs(reply) == [same]


async def test_outputs_come_in_the_order_of_the_request() -> None:
    async with running_front() as front:
        names = ["num_output_tokens", "text_output", "sequence_length", "batch_index"]
        wanted = [{"name": name} for name in names]
        found = outputs(await infer(front, TEXT, SHORT, outputs=wanted))
        assert [one["name"] for one in found] == names
        assert [one["data"] for one in found] == [[1], ["Hi" + ANSWER[:5]], [1], [0]]


async def test_bytes_in_and_out() -> None:
    async with running_front() as front:
        body, length = binary_body(INPUTS, parameters={"binary_data_output": True})
        reply = await front.ask("POST", PATH, body, **{HEADER_LENGTH: str(length)})
        assert binary_outputs(reply) == {"text_output": (f"Hi{ANSWER}".encode(),)}
        body, length = binary_body(INPUTS)
        reply = await front.ask("POST", PATH, body, **{HEADER_LENGTH: str(length)})
        assert outputs(reply)[0]["data"] == ["Hi" + ANSWER]


async def test_each_output_says_where_it_goes() -> None:
    async with running_front() as front:
        wanted = [
            {"name": "cumulative_logprob"},
            {"name": "text_output", "parameters": {"binary_data": False}},
            {"name": "finish_reason", "parameters": {"binary_data": True}},
        ]
        reply = await infer(
            front, TEXT, SHORT, outputs=wanted, parameters={"binary_data_output": True}
        )
        length = int(reply.headers[HEADER_LENGTH.lower()])
        score, text, reason = json.loads(reply.body[:length])["outputs"]
        assert text["data"] == ["Hi" + ANSWER[:5]]
        assert score["parameters"] == {"binary_data_size": 4}
        assert reason["parameters"] == {"binary_data_size": 10}
        assert reply.body[length + 4 :] == b"\6\0\0\0length"


async def test_a_body_without_json_is_the_prompt() -> None:
    async with running_front() as front:
        prompt = "Grüße, 東京\0\n"
        reply = await front.ask("POST", PATH, prompt.encode(), **{HEADER_LENGTH: "0"})
        assert binary_outputs(reply) == {"text_output": ((prompt + ANSWER).encode(),)}


async def test_infer_gathers_a_stream() -> None:
    async with running_front() as front:
        stream = {"name": "stream", "datatype": "BOOL", "shape": [1], "data": [True]}
        (found,) = outputs(await infer(front, TEXT, stream, parameters={"max_tokens": 50}))
        assert found["data"] == [ANSWER]


async def test_several_sequences_are_elements() -> None:
    async with running_front() as front:
        several = {"name": "num_return_sequences", "datatype": "INT32", "shape": [1], "data": [3]}
        scores = {"name": "return_log_probs", "datatype": "BOOL", "shape": [1], "data": [True]}
        text, total, each = outputs(await infer(front, TEXT, several, scores))
        assert text["shape"] == total["shape"] == [3]
        assert each["shape"] == [3, 16]
        assert len(each["data"]) == each["shape"][0] * each["shape"][1]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "GZIP"])
async def test_compressed_in_both_directions(encoding: str) -> None:
    async with running_front() as front:
        body, length = binary_body(INPUTS, parameters={"binary_data_output": True})
        press = zlib.compress if encoding == "deflate" else gzip.compress
        headers = {
            HEADER_LENGTH: str(length),
            "Content-Encoding": encoding,
            "Accept-Encoding": encoding,
        }
        reply = await front.ask("POST", PATH, press(body), **headers)
        assert reply.headers["content-encoding"] == encoding.lower()
        assert reply.headers["vary"] == "Accept-Encoding"
        plain = zlib.decompress(reply.body, 47)
        assert reply.headers["content-length"] == str(len(reply.body))
        answer = binary_outputs(Reply(reply.status, reply.headers, plain))
        assert answer == {"text_output": (f"Hi{ANSWER}".encode(),)}


def changed(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{**TEXT, **fields}]}


BAD: list[tuple[Any, str]] = [
    ({}, "'inputs' is missing"),
    ({"inputs": []}, "'inputs' must not be empty"),
    ({"inputs": {}}, "'inputs'"),
    ({"inputs": [5]}, "'inputs[0]'"),
    ({"inputs": [None]}, "'inputs[0]'"),
    (changed(name=None), "'inputs[0].name'"),
    (changed(name="x"), "'x' is no input"),
    (changed(datatype=None), "'inputs[0].datatype' is missing"),
    (changed(datatype="BF16"), "'inputs[0].datatype' must be one of"),
    (changed(datatype="INT32", data=[1]), "'text_input' must be BYTES, not INT32"),
    (changed(shape=None), "'inputs[0].shape' is missing"),
    (changed(shape=[2]), "'text_input' has 1 elements, but its shape means 2"),
    (changed(shape=[-1]), "'inputs[0].shape[0]'"),
    (changed(shape=[1] * 17), "'inputs[0].shape'"),
    (changed(shape=[0], data=[]), "'text_input' must be a string"),
    (changed(shape=[2], data=["a", "b"]), "'text_input' must be a string"),
    (changed(data=None), "'text_input' must have either 'data'"),
    (changed(data="Hi"), "'inputs[0].data' must be an array"),
    (changed(data=[5]), "'text_input' must hold strings"),
    (changed(parameters={"binary_data_size": 6}), "'text_input' must have either 'data'"),
    (changed(data=None, parameters={"binary_data_size": 6}), "as many bytes behind the JSON"),
    (changed(parameters={"shared_memory_region": "x"}), "shared_memory_region' is not supported"),
    ({"inputs": [TEXT, TEXT]}, "'text_input' is given twice"),
    ({"inputs": [TEXT], "outputs": [{"name": "x"}]}, "'x' is no output"),
    ({"inputs": [TEXT], "outputs": [{"name": "text_output"}] * 2}, "each output once"),
    (
        {
            "inputs": [TEXT],
            "outputs": [{"name": "text_output", "parameters": {"classification": 2}}],
        },
        "classification' is not supported",
    ),
    ({"inputs": [TEXT], "parameters": {"binary_data_output": 1}}, "binary_data_output"),
    ({"inputs": [TEXT], "parameters": {"temperature": 9}}, "'temperature'"),
    ({"inputs": [TEXT], "parameters": {"sequence_id": 9}}, "'sequence_id' is not supported"),
    ({"inputs": [TEXT], "id": 5}, "'id'"),
]


@pytest.mark.parametrize(("body", "complaint"), BAD, ids=[complaint for _, complaint in BAD])
def test_bad_bodies(body: Any, complaint: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        read_infer(encode(body), None, vocab_size=1000)
    assert complaint in caught.value.message
    assert caught.value.status == 400


@pytest.mark.parametrize("length", ["x", "-1", "1.5", "99999", "9" * 5000, "", " 1"])
def test_bad_lengths_of_the_json(length: str) -> None:
    with pytest.raises(BadRequestError, match=HEADER_LENGTH):
        read_infer(encode({"inputs": [TEXT]}), length, vocab_size=1000)


def test_a_missing_body_is_no_prompt() -> None:
    with pytest.raises(BadRequestError, match="not valid JSON"):
        read_infer(b"", None, vocab_size=1000)


def test_very_many_inputs_take_no_time() -> None:
    told = {
        "name": "stop",
        "datatype": "BYTES",
        "shape": [0],
        "parameters": {"binary_data_size": 0},
    }
    head = encode({"inputs": [told] * 20_000})
    with pytest.raises(BadRequestError, match="bytes more than its inputs"):
        read_infer(head + bytes(8_000_000), str(len(head)), vocab_size=1000)


def test_bytes_that_belong_to_no_input() -> None:
    body, length = binary_body(INPUTS)
    with pytest.raises(BadRequestError, match="3 bytes more than its inputs"):
        read_infer(body + b"abc", str(length), vocab_size=1000)
    with pytest.raises(BadRequestError, match="as many bytes"):
        read_infer(body[:-1], str(length), vocab_size=1000)


BODY, LENGTH = binary_body(INPUTS, parameters={"binary_data_output": True}, outputs=[])


@settings(max_examples=300)
@given(st.data())
def test_a_mutilated_body_is_read_or_refused(data: st.DataObject) -> None:
    body = bytearray(BODY)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(body)))
        stop = data.draw(st.integers(start, min(len(body), start + 6)))
        body[start:stop] = data.draw(st.binary(max_size=6))
    length = data.draw(st.sampled_from([LENGTH, len(body)]) | st.integers(0, len(body) + 2))
    with suppress(BadRequestError):  # anything else would be a 500
        asked = read_infer(bytes(body), str(length), vocab_size=1000)
        assert asked.asked.request.prompts


@given(st.text(min_size=20, max_size=99), st.sampled_from(["name", "datatype"]))
def test_complaints_are_short(text: str, field: str) -> None:
    body = encode(changed(**{field: "x" + 20 * text}))
    with pytest.raises(BadRequestError) as caught:
        read_infer(body, None, vocab_size=1000)
    assert len(caught.value.message) < 500
