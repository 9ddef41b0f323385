"""/tokenize and /detokenize: texts, conversations, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http_front import Front, chat_body, running_front

TEXT = "Grüße, 東京!"


async def tokens(front: Front, **body: Any) -> list[int]:
    reply = await front.ask("POST", "/tokenize", body)
    assert reply.status == 200, reply.body
    told = reply.json()
    assert told["count"] == len(told["tokens"])
    assert told["max_model_len"] == front.state.engine.longest_sequence
    ids: list[int] = told["tokens"]
    return ids


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_there_and_back_again(prefix: str) -> None:
    async with running_front() as front:
        told = (await front.ask("POST", f"{prefix}/tokenize", {"prompt": TEXT})).json()
        body = {"tokens": told["tokens"]}
        back = (await front.ask("POST", f"{prefix}/detokenize", body)).json()
        assert back == {"prompt": TEXT, "text": TEXT, "content": TEXT}


async def test_content_is_another_word_for_prompt() -> None:
    async with running_front() as front:
        assert await tokens(front, content=TEXT) == await tokens(front, prompt=TEXT)
        assert await tokens(front, prompt="") == []


async def test_long_texts_are_encoded_in_a_thread_with_the_same_result() -> None:
    async with running_front() as front:
        assert await tokens(front, prompt="a " * 40_000) == front.tokenizer.encode("a " * 40_000)


async def test_a_conversation_has_the_tokens_that_it_is_answered_with() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    async with running_front() as front:
        for fields in ({}, {"tools": [tool]}):
            ids = await tokens(front, **chat_body(TEXT, **fields))
            usage = (await front.chat(TEXT, **fields)).json()["usage"]
            assert len(ids) == usage["prompt_tokens"]
        bare = await tokens(front, **chat_body(TEXT), add_generation_prompt=False)
        assert front.tokenizer.decode(bare).endswith("<|im_end|>\n")


async def test_tokens_have_texts() -> None:
    async with running_front() as front:
        reply = await front.ask("POST", "/tokenize", {"prompt": "To be", "return_token_strs": True})
        assert "".join(reply.json()["token_strs"]) == "To be"


async def test_special_tokens_can_be_left_out() -> None:
    async with running_front() as front:
        ids = await tokens(front, prompt="a<|im_end|>b")
        body = {"tokens": ids, "skip_special_tokens": True}
        assert (await front.ask("POST", "/detokenize", body)).json()["prompt"] == "ab"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"content": "a", "with_pieces": True}, "with_pieces"),
        ("/tokenize", chat_body(add_special_tokens=True), "add_special_tokens"),
        ("/tokenize", chat_body(continue_final_message=True), "continue_final_message"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [1], "model": 5}, "model"),
    ],
)
async def test_bad_fields_are_blamed_by_name(path: str, body: Any, param: str) -> None:
    async with running_front() as front:
        reply = await front.ask("POST", path, body)
        assert reply.status == 400
        assert reply.error()["param"] == param


async def test_an_unknown_model_is_404() -> None:
    async with running_front() as front:
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            reply = await front.ask("POST", path, {**body, "model": "other"})
            assert reply.error()["code"] == "model_not_found"
