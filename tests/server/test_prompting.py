"""Sequences from requests: seeds, the context check, the model's text side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kttrio.config import ServerConfig
from kttrio.server.constraints import Constraints
from kttrio.server.errors import BadRequestError
from kttrio.server.openai.request import parse_chat
from kttrio.server.prompting import Intake, check_length, choice_seed, prepare_chat
from kttrio.server.requests import ChatRequest
from kttrio.server.served_model import ServedModel
from tests.tokenizers_fake import make_family_tokenizer


def test_the_seeds_of_choices_are_far_apart_and_reproducible() -> None:
    seeds = [choice_seed(seed, i) for seed in range(50) for i in range(128)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert choice_seed(7, 0) == 7
    assert choice_seed(7, 3) == choice_seed(7, 3)


def test_the_context_check_is_exact() -> None:
    check_length(60, 4, 64)
    with pytest.raises(BadRequestError, match="65: 60 in the prompt, 5 to"):
        check_length(60, 5, 64)
    with pytest.raises(BadRequestError, match="at least one"):
        check_length(0, 1, 64)


def chat(*messages: dict[str, Any], **template_kwargs: Any) -> ChatRequest:
    body = {"messages": list(messages), "chat_template_kwargs": template_kwargs}
    return parse_chat(body, model="m", vocab_size=400)


@pytest.mark.parametrize(
    ("sent", "text"),
    [('{"a":1e3}', '{"a":1e3}'), ({"a": 1}, '{"a": 1}'), (" ", "{}"), (None, "{}"), ("{oops",) * 2],
)
def test_past_arguments_stay_as_the_client_sent_them(sent: object, text: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": sent}}
    request = chat({"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": ""})
    [read] = request.messages[0]["tool_calls"]
    assert str(read["function"]["arguments"]) == text
    assert read["id"] == "c"


INTAKE = Intake(
    request_id="r",
    num_bytes=0,
    context_length=4096,
    most_sequences=8,
    seed=1,
    constraints=Constraints(),
)


@pytest.mark.parametrize(
    ("family", "kwargs", "end"),
    [
        ("qwen3_5", {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ("glm45", {"enable_thinking": False}, "<think></think>"),
        ("deepseek_v31", {"thinking": True}, "<｜Assistant｜><think>"),
        ("deepseek_v32", {"thinking": True}, "<｜Assistant｜><think>"),
        ("deepseek_v32", {}, "<｜Assistant｜></think>"),
    ],
)
async def test_the_requests_kwargs_reach_template_and_encoder(
    family: str, kwargs: dict[str, Any], end: str, tmp_path: Path
) -> None:
    model = ServedModel.load(make_family_tokenizer(tmp_path, family), ServerConfig())
    prepared = await prepare_chat(model, chat({"role": "user", "content": "Hi"}, **kwargs), INTAKE)
    assert model.tokenizer.decode(list(prepared.requests[0].prompt_ids)).endswith(end)


async def test_what_the_encoder_refuses_is_the_clients_error(tmp_path: Path) -> None:
    model = ServedModel.load(make_family_tokenizer(tmp_path, "deepseek_v32"), ServerConfig())
    result = {"role": "tool", "content": "5", "tool_call_id": "x"}
    with pytest.raises(BadRequestError, match="1 tool results follow 0 tool calls"):
        await prepare_chat(model, chat(result), INTAKE)
