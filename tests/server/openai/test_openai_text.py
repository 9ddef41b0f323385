"""POST /v1/completions and the list of models."""

from __future__ import annotations

from typing import Any

import pytest

from kttrio.config import EngineConfig
from tests.fakes import scripted_logprob
from tests.http_front import ANSWER, MODEL, Front, Reply, running_front


def choices(reply: Reply) -> list[dict[str, Any]]:
    assert reply.status == 200, reply.body
    found: list[dict[str, Any]] = reply.json()["choices"]
    return found


def streamed(reply: Reply, num_choices: int = 1) -> list[dict[str, Any]]:
    """The choices of a stream, put together as in a whole answer."""
    *events, done = reply.events()
    assert done == "[DONE]"
    whole: list[dict[str, Any]] = [{"text": "", "logprobs": None} for _ in range(num_choices)]
    for entry in (choice for event in events for choice in event["choices"]):
        choice = whole[entry["index"]]
        choice["text"] += entry["text"]
        choice["finish_reason"] = entry["finish_reason"]
        for name, values in (entry["logprobs"] or {}).items():
            choice["logprobs"] = choice["logprobs"] or {}
            choice["logprobs"].setdefault(name, []).extend(values)
    return whole


def prompts_of_last_plans(front: Front, count: int) -> set[tuple[int, ...]]:
    first_chunks = [c for plan in front.runner.history for c in plan.chunks if c.start == 0]
    return {chunk.token_ids for chunk in first_chunks[-count:]}


async def test_a_whole_answer_has_every_field() -> None:
    async with running_front() as front:
        answer = (await front.complete("Hi", max_tokens=50)).json()
        assert answer["id"].startswith("cmpl-")
        assert (answer["object"], answer["model"]) == ("text_completion", MODEL)
        assert answer["choices"] == [
            {
                "index": 0,
                "text": ANSWER,
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": front.script.end_id,
            }
        ]
        assert answer["usage"]["prompt_tokens"] == 2
        assert answer["metadata"] == {"weight_version": "default"}


async def test_sixteen_tokens_by_default() -> None:
    async with running_front() as front:
        front.script.endless = True
        answer = (await front.complete()).json()
        assert answer["usage"]["completion_tokens"] == 16
        assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "count"), [("ab", 1), (["ab", "cd"], 2), ([5, 6, 7], 1), ([[5, 6], [7], [8, 9]], 3)]
)
async def test_the_four_spellings_of_prompts(prompt: Any, count: int) -> None:
    async with running_front() as front:
        reply = await front.complete(prompt, max_tokens=3)
        assert [choice["index"] for choice in choices(reply)] == list(range(count))
        texts = prompt if isinstance(prompt, list) else [prompt]
        if isinstance(texts[0], int):
            texts = [texts]
        ids = {tuple(front.tokenizer.encode(t) if isinstance(t, str) else t) for t in texts}
        assert prompts_of_last_plans(front, count) == ids
        assert reply.json()["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_strings_and_token_ids_may_be_mixed() -> None:
    async with running_front() as front:
        assert len(choices(await front.complete(["ab", [5, 6]], max_tokens=1))) == 2


async def test_more_answers_than_could_ever_wait_are_a_400_and_not_a_429() -> None:
    engine = EngineConfig(max_running_requests=1, max_queued_requests=2)
    async with running_front(engine_config=engine) as front:
        assert len(choices(await front.complete(["a", "b", "c"], max_tokens=1))) == 3
        assert len(choices(await front.complete("a", n=3, max_tokens=1))) == 3
        error = (await front.complete(["a", "b"], n=2)).error()
        assert (error["param"], error["type"]) == ("prompt", "invalid_request_error")
        assert "4 answers" in error["message"]
        assert "at most 3" in error["message"]
        assert (await front.chat(n=4)).error()["param"] == "n"


async def test_n_for_each_prompt_with_the_same_seeds() -> None:
    async with running_front() as front:
        reply = await front.complete(["a", "b"], n=2, seed=11, max_tokens=1)
        assert [choice["index"] for choice in choices(reply)] == [0, 1, 2, 3]
        chunks = [chunk for plan in front.runner.history for chunk in plan.chunks]
        seeds: dict[tuple[int, ...], list[int]] = {}
        for chunk in chunks:
            seeds.setdefault(chunk.token_ids, []).append(chunk.sampling.seed)
        first, second = seeds.values()
        assert first == second
        assert first[0] == 11
        assert first[1] != 11
        assert reply.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_scores_the_prompt(stream: bool) -> None:
    async with running_front() as front:
        fields = {"echo": True, "logprobs": 2, "max_tokens": 0, "stream": stream}
        reply = await front.complete("Grüße 東京", **fields)
        (choice,) = streamed(reply) if stream else choices(reply)
        assert choice["text"] == "Grüße 東京"
        assert choice["finish_reason"] == "length"
        ids = front.tokenizer.encode("Grüße 東京")
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == [front.tokenizer.piece(token) for token in ids]
        assert logprobs["token_logprobs"] == [None, *map(scripted_logprob, ids[1:])]
        assert logprobs["top_logprobs"][0] is None
        assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
        offsets = [len(front.tokenizer.decode(ids[:i])) for i in range(len(ids))]
        assert logprobs["text_offset"] == offsets


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_and_answer_together(stream: bool) -> None:
    async with running_front() as front:
        fields = {"echo": True, "logprobs": 0, "max_tokens": 30, "stream": stream}
        reply = await front.complete([[72, 73], "Hi"], **fields)
        first, second = streamed(reply, 2) if stream else choices(reply)
        assert first["text"] == front.tokenizer.decode([72, 73]) + ANSWER
        assert second["text"] == "Hi" + ANSWER
        logprobs = second["logprobs"]
        num_tokens = 2 + len(front.tokenizer.encode(ANSWER)) + 1
        assert {len(values) for values in logprobs.values()} == {num_tokens}
        assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


async def test_echo_without_logprobs() -> None:
    async with running_front() as front:
        (choice,) = choices(await front.complete("Hi", echo=True, max_tokens=0))
        assert (choice["text"], choice["logprobs"]) == ("Hi", None)
        (choice,) = choices(await front.complete("Hi", max_tokens=0))
        assert choice["text"] == ""


async def test_streams_follow_the_rules() -> None:
    async with running_front() as front:
        fields = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, usage, done = (await front.complete(max_tokens=40, **fields)).events()
        assert done == "[DONE]"
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == len(front.tokenizer.encode(ANSWER)) + 1
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ANSWER
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert [*reasons[:-1], "stop"] == [*[None] * (len(reasons) - 1), reasons[-1]]


async def test_models() -> None:
    async with running_front(context_length=512) as front:
        listed = (await front.ask("GET", "/v1/models")).json()
        (entry,) = listed["data"]
        assert listed["object"] == "list"
        assert (entry["id"], entry["object"], entry["max_model_len"]) == (MODEL, "model", 512)
        assert (await front.ask("GET", f"/v1/models/{MODEL}")).json() == entry
        missing = await front.ask("GET", "/v1/models/some/other")
        assert missing.status == 404
        assert missing.error()["code"] == "model_not_found"
