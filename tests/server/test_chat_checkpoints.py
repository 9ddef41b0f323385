"""Each family's trained checkpoint, its model aside: a request becomes the token ids that
transformers made of it, and the tokens of its answer become what the client is to read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kttrio.config import ServerConfig
from kttrio.request import FinishReason, TokenEvent
from kttrio.server.constraints import Constraints
from kttrio.server.decoding import Answer, Delta
from kttrio.server.openai.request import parse_chat
from kttrio.server.prompting import Intake, prepare_chat
from kttrio.server.served_model import ServedModel
from tests.making.voices import GREETING, REPORT, THOUGHTS

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHATS = [
    pytest.param(directory, chat, id=f"{directory.name}-{chat['name']}")
    for directory in sorted(FIXTURES.glob("*_chat"))
    for chat in json.loads((directory / "golden.json").read_text())
]
INTAKE = Intake(
    request_id="r",
    num_bytes=0,
    context_length=4096,
    most_sequences=8,
    seed=1,
    constraints=Constraints(),
)


async def prepared(model: ServedModel, chat: dict):
    fields = ("messages", "tools", "chat_template_kwargs")
    body = {name: chat[name] for name in fields if chat[name] is not None}
    request = parse_chat(body, model="m", vocab_size=model.tokenizer.vocab_size)
    return await prepare_chat(model, request, INTAKE)


def events(model: ServedModel, ids: list[int]) -> list[TokenEvent]:
    """One per token, as the engine sends them; the last ends the answer."""
    assert [id in model.end_ids for id in ids] == [False] * (len(ids) - 1) + [True]
    return [TokenEvent(id) for id in ids[:-1]] + [TokenEvent(ids[-1], FinishReason.STOP)]


@pytest.mark.parametrize(("directory", "chat"), CHATS)
async def test_a_chat_becomes_the_golden_prompt(directory, chat):
    model = ServedModel.load(directory, ServerConfig())
    sequence = (await prepared(model, chat)).requests[0]
    assert list(sequence.prompt_ids) == chat["prompt_ids"]


@pytest.mark.parametrize(("directory", "chat"), CHATS)
async def test_the_golden_answer_is_read_as_it_was_meant(directory, chat):
    model = ServedModel.load(directory, ServerConfig())
    decoder = (await prepared(model, chat)).decoders[0]
    fed = [decoder.feed(event) for event in events(model, chat["answer_ids"])]
    deltas = [delta for news in fed for delta in ([Delta(news)] if isinstance(news, str) else news)]
    answer = Answer.of(deltas)
    asked = chat["name"].split("_")[0]
    thought = THOUGHTS[asked] if THOUGHTS[asked] in chat["answer"] else ""
    assert answer.reasoning == thought
    assert answer.text == {"hi": GREETING, "call": "", "result": REPORT}[asked]
    calls = [(call.name, json.loads(call.arguments)) for call in answer.calls]
    assert calls == ([("get_weather", {"city": "Oslo", "days": 3})] if asked == "call" else [])
