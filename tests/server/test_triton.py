"""Triton's routes beside infer: health, what the model is, generate and its stream."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from kttrio.config import EngineConfig, ServerConfig
from tests.http_front import ANSWER, MODEL, Front, Reply, running_front

AT = f"/v2/models/{MODEL}"


def error(reply: Reply, status: int) -> str:
    assert reply.status == status, reply.body
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert list(body) == ["error"]
    text: str = body["error"]
    return text


async def generate(front: Front, **values: Any) -> dict[str, Any]:
    reply = await front.ask("POST", f"{AT}/generate", {"text_input": "Hi", **values})
    assert reply.status == 200, reply.body
    answer: dict[str, Any] = reply.json()
    assert (answer["model_name"], answer["model_version"]) == (MODEL, "1")
    return answer


async def stream(front: Front, **values: Any) -> list[dict[str, Any]]:
    reply = await front.ask("POST", f"{AT}/generate_stream", {"text_input": "Hi", **values})
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    return reply.events()


async def statistics(front: Front) -> dict[str, Any]:
    (told,) = (await front.ask("GET", f"{AT}/stats")).json()["model_stats"]
    assert (told["name"], told["version"]) == (MODEL, "1")
    found: dict[str, Any] = told
    return found


async def test_health_and_readiness() -> None:
    async with running_front() as front:
        paths = ["/v2/health/live", "/v2/health/ready", f"{AT}/ready", f"{AT}/versions/1/ready"]
        for path in paths:
            reply = await front.ask("GET", path)
            assert (reply.status, reply.body) == (200, b""), path
        assert "'x/y' is not found" in error(await front.ask("GET", "/v2/models/x/y/ready"), 400)
        assert "version 2" in error(await front.ask("GET", f"{AT}/versions/2/ready"), 400)
        front.state.begin_drain()
        assert "shutting down" in error(await front.ask("GET", "/v2/health/ready"), 400)
        assert "shutting down" in error(await front.ask("GET", f"{AT}/ready"), 400)
        assert (await front.ask("GET", "/v2/health/live")).status == 200


async def test_health_needs_no_key_and_all_else_does() -> None:
    async with running_front(config=ServerConfig(api_key=("secret",))) as front:
        assert (await front.ask("GET", "/v2/health/live")).status == 200
        assert (await front.ask("GET", "/v2/health/ready")).status == 200
        for path in ("/v2", AT, f"{AT}/ready", "/v2/models/stats"):
            assert "API key" in error(await front.ask("GET", path), 401)
        assert (await front.ask("GET", AT, Authorization="Bearer secret")).status == 200


async def test_the_server_and_its_model_describe_themselves() -> None:
    async with running_front() as front:
        server = (await front.ask("GET", "/v2")).json()
        assert set(server) == {"name", "version", "extensions"}
        assert "binary_tensor_data" in server["extensions"]
        told = (await front.ask("GET", AT)).json()
        assert (told["name"], told["versions"]) == (MODEL, ["1"])
        text = {"name": "text_input", "datatype": "BYTES", "shape": [1]}
        assert told["inputs"][0] == text
        assert told["outputs"][0] == {"name": "text_output", "datatype": "BYTES", "shape": [-1]}
        config = (await front.ask("GET", f"{AT}/config")).json()
        assert config["model_transaction_policy"] == {"decoupled": True}
        assert config["max_batch_size"] == 0
        first, *rest = config["input"]
        text = {"name": "text_input", "data_type": "TYPE_STRING", "dims": [1], "optional": False}
        assert first == text
        assert all(tensor["optional"] for tensor in rest)
        assert [one["name"] for one in config["input"]] == [one["name"] for one in told["inputs"]]
        for tail in ("", "/config"):
            same = await front.ask("GET", f"{AT}/versions/1{tail}")
            assert same.json() == (await front.ask("GET", f"{AT}{tail}")).json()


@pytest.mark.parametrize(
    "path",
    ["/x", "/x/config", "/x/stats", f"/{MODEL}/versions/2", f"/{MODEL}/versions/2/stats"],
)
async def test_unknown_models_and_versions(path: str) -> None:
    async with running_front() as front:
        reply = await front.ask("GET", f"/v2/models{path}")
        assert error(reply, 404).startswith("Request for unknown model: '")
        assert error(await front.ask("GET", "/v2/nothing"), 404)


async def test_wrong_methods() -> None:
    async with running_front() as front:
        for path in (f"{AT}/infer", f"{AT}/generate", f"{AT}/generate_stream"):
            reply = await front.ask("GET", path)
            assert error(reply, 405)
            assert "POST" in reply.headers["allow"]
        assert error(await front.ask("POST", f"{AT}/config", {}), 405)
        assert error(await front.ask("DELETE", AT), 405)


async def test_the_repository_has_one_model_that_stays() -> None:
    async with running_front() as front:
        entry = {"name": MODEL, "version": "1", "state": "READY", "reason": ""}
        index = "/v2/repository/index"
        for body in (None, {}, {"ready": True}):
            assert (await front.ask("POST", index, body)).json() == [entry]
        assert "'ready'" in error(await front.ask("POST", index, {"ready": "yes"}), 400)
        for verb in ("load", "unload"):
            path = f"/v2/repository/models/{MODEL}/{verb}"
            assert "while the server runs" in error(await front.ask("POST", path, {}), 400)
        front.state.begin_drain()
        assert (await front.ask("POST", index, {"ready": True})).json() == []
        (entry,) = (await front.ask("POST", index)).json()
        assert entry["state"] == "UNAVAILABLE"
        assert "shutting down" in entry["reason"]


@pytest.mark.parametrize(
    "path",
    [
        "trace/setting",
        f"models/{MODEL}/trace/setting",
        "logging",
        "systemsharedmemory/status",
        "cudasharedmemory/region/x/register",
    ],
)
async def test_what_is_not_offered_says_so(path: str) -> None:
    async with running_front() as front:
        assert "no tracing, logging" in error(await front.ask("GET", f"/v2/{path}"), 404)
        assert "no tracing, logging" in error(await front.ask("POST", f"/v2/{path}", {}), 404)


async def test_generate_answers_after_the_prompt() -> None:
    async with running_front() as front:
        answer = await generate(front, max_tokens=50)
        assert answer == {"model_name": MODEL, "model_version": "1", "text_output": "Hi" + ANSWER}
        answer = await generate(front, exclude_input_in_output=True, parameters={"max_tokens": "1"})
        assert answer["text_output"] == ANSWER[:5]
        assert (await generate(front, id="a7"))["id"] == "a7"
        assert "id" not in await generate(front, id="")


async def test_generate_gathers_a_stream() -> None:
    async with running_front() as front:
        assert (await generate(front, stream=True, max_tokens=50))["text_output"] == ANSWER


async def test_outputs_that_flags_ask_for() -> None:
    async with running_front() as front:
        flags = ("finish_reason", "cumulative_logprob", "num_input_tokens", "num_output_tokens")
        asked = {f"return_{name}": True for name in flags}
        answer = await generate(front, **asked, max_tokens=50)
        num_tokens = len(front.tokenizer.encode(ANSWER)) + 1
        assert answer["finish_reason"] == "stop"
        assert answer["num_input_tokens"] == 2
        assert answer["num_output_tokens"] == num_tokens
        assert answer["cumulative_logprob"] < 0
        answer = await generate(front, return_log_probs=True, max_tokens=3, n=2)
        assert len(answer["text_output"]) == 2
        assert answer["cum_log_probs"][0] == pytest.approx(sum(answer["output_log_probs"][:3]))
        assert len(answer["output_log_probs"]) == 6


async def test_logprobs_are_json_as_vllm_writes_it() -> None:
    async with running_front() as front:
        answer = await generate(front, return_logprobs=True, logprobs=2, max_tokens=2)
        first, second = json.loads(answer["logprobs"])
        token = front.tokenizer.encode(ANSWER)[0]
        assert len(first) == 2
        assert first[str(token)]["rank"] == 1
        assert first[str(token)]["decoded_token"] == front.tokenizer.piece(token)
        assert all(entry["logprob"] <= 0 for entry in second.values())
        answer = await generate(front, return_logprobs=True, max_tokens=1)
        assert [entry["rank"] for entry in json.loads(answer["logprobs"])[0].values()] == [None]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"text_input": "a", "text_input": "a"}',
        b'{"text_input": "a", "parameters": {"n": 1, "n": 1}}',
        b'{"text_input": NaN}',
        b'{"text_input": "\\ud800"}',
        b'{"text_input": "a", "max_tokens": 99999}',
        b'{"text_input": "a", "parameters": []}',
        b'{"text_input": "a", "id": 5}',
        b'{"text_input": ""}',
    ],
)
@pytest.mark.parametrize("action", ["generate", "generate_stream"])
async def test_bad_bodies(body: bytes, action: str) -> None:
    async with running_front() as front:
        assert error(await front.ask("POST", f"{AT}/{action}", body), 400)


async def test_a_stream_is_the_answer_in_pieces_without_prompt_or_done() -> None:
    async with running_front() as front:
        events = await stream(front, stream=True, max_tokens=50, id="a7")
        assert "".join(event["text_output"] for event in events) == ANSWER
        assert len(events) > 5
        head = {"id": "a7", "model_name": MODEL, "model_version": "1"}
        assert all({**event, "text_output": ""} == {**head, "text_output": ""} for event in events)


async def test_generate_stream_without_stream_is_one_event() -> None:
    async with running_front() as front:
        (event,) = await stream(front, max_tokens=50)
        assert event["text_output"] == "Hi" + ANSWER


async def test_responses_of_a_stream_tell_only_what_is_new() -> None:
    async with running_front() as front:
        events = await stream(
            front,
            stream=True,
            max_tokens=50,
            return_finish_reason=True,
            return_num_output_tokens=True,
            return_cumulative_logprob=True,
        )
        assert "".join(event["text_output"] for event in events) == ANSWER
        num_tokens = [event["num_output_tokens"] for event in events]
        assert sum(num_tokens) == len(front.tokenizer.encode(ANSWER)) + 1
        assert num_tokens[0] == 1
        reasons = [event["finish_reason"] for event in events]
        assert reasons == [*["None"] * (len(events) - 1), "stop"]
        sums = [event["cumulative_logprob"] for event in events]
        assert sums == sorted(sums, reverse=True)


async def test_choices_of_a_stream_have_an_element_each() -> None:
    async with running_front() as front:
        events = await stream(front, stream=True, max_tokens=50, n=2)
        pairs = [event["text_output"] for event in events]
        assert all(len(pair) == 2 for pair in pairs)
        assert ["".join(texts) for texts in zip(*pairs, strict=True)] == [ANSWER, ANSWER]


async def test_what_fails_before_the_first_response_is_an_http_error() -> None:
    async with running_front(fail_steps=(0,)) as front:
        reply = await front.ask(
            "POST", f"{AT}/generate_stream", {"text_input": "Hi", "stream": True}
        )
        assert error(reply, 500)
        told = (await statistics(front))["inference_stats"]
        assert (told["success"]["count"], told["fail"]["count"]) == (0, 1)


async def test_what_fails_later_is_an_event() -> None:
    async with running_front(fail_steps=(3,)) as front:
        *events, last = await stream(front, stream=True, max_tokens=50)
        assert [list(event) for event in events] == [
            ["model_name", "model_version", "text_output"]
        ] * 3
        assert list(last) == ["error"]
        assert (await statistics(front))["inference_stats"]["fail"]["count"] == 1


async def test_a_full_queue_is_a_429() -> None:
    engine = EngineConfig(max_running_requests=1, max_queued_requests=0)
    async with running_front(engine_config=engine) as front:
        front.script.endless = True
        client = await front.connect()
        body = {"text_input": "Hi", "stream": True, "max_tokens": 900}
        await client.send("POST", f"{AT}/generate_stream", body)
        await client.begin()
        reply = await front.ask("POST", f"{AT}/generate_stream", body)
        assert error(reply, 429)
        assert "retry-after" in reply.headers


async def test_statistics_count_requests() -> None:
    async with running_front() as front:
        before = await statistics(front)
        assert (before["inference_count"], before["last_inference"]) == (0, 0)
        await generate(front)
        await stream(front, stream=True)
        await front.ask("POST", f"{AT}/generate", {"text_input": "Hi", "max_tokens": 99999})
        told = await statistics(front)
        assert (told["inference_count"], told["execution_count"]) == (2, 2)
        assert told["last_inference"] > 1_700_000_000_000
        spent = told["inference_stats"]
        assert spent["success"]["count"] == spent["compute_infer"]["count"] == 2
        assert spent["fail"]["count"] == 1
        parts = ("compute_input", "compute_infer", "compute_output")
        assert sum(spent[part]["ns"] for part in parts) == spent["success"]["ns"]
        assert (await front.ask("GET", "/v2/models/stats")).json() == {"model_stats": [told]}


async def test_a_client_that_leaves_is_a_failure_and_frees_the_engine() -> None:
    async with running_front() as front:
        front.script.endless = True
        for action in ("generate", "generate_stream"):
            client = await front.connect()
            body = {"text_input": "Hi", "stream": True, "max_tokens": 900}
            await client.send("POST", f"{AT}/{action}", body)
            while not front.state.live:
                await trio.lowlevel.checkpoint()
            await client.stream.aclose()
            await front.idle()
        assert (await statistics(front))["inference_stats"]["fail"]["count"] == 2
