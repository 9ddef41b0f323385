"""Answers that are held to a form, from the request to the last token, over a scripted runner."""

from __future__ import annotations

import gc
import json
import re
from typing import Any

import pytest
import trio

from kttrio.config import ServerConfig
from kttrio.server import constraints
from kttrio.server.answering import collect, open_intake
from kttrio.server.constraints import MatchedConstraint
from kttrio.server.decoding import Answer
from kttrio.server.errors import ApiError, BadRequestError
from kttrio.server.forms import chat_spec
from kttrio.server.prompting import prepare_chat, prepare_text
from kttrio.server.requests import ChatRequest, Options, TextRequest
from kttrio.text.grammar import ForcedCalls, Form
from tests.http_front import Front, running_front

PLATE = Form("regex", "[A-Z]{2}-[0-9]{3}", "guided_regex")
POINT = Form(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {"side": {"enum": ["left", "right"]}, "on": {"type": "boolean"}},
            "required": ["side", "on"],
            "additionalProperties": False,
        }
    ),
    "response_format.json_schema.schema",
)
THINKS = ServerConfig(reasoning_parser="qwen3")


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def chat(form: Form | None = None, **fields: Any) -> ChatRequest:
    options = Options(form=form, **fields.pop("options", {}))
    messages = [{"role": "user", "content": "Hi"}]
    return ChatRequest(
        **{"options": options, "messages": messages, "tools": [], "template_kwargs": {}, **fields}
    )


async def ask(front: Front, request: ChatRequest | TextRequest) -> list[Answer]:
    intake, model = open_intake(front.state, "r", 0), front.state.model
    if isinstance(request, ChatRequest):
        prepared = await prepare_chat(model, request, intake)
    else:
        prepared = await prepare_text(model, request, intake)
    answers, _ = await collect(front.state, prepared)
    return answers


@pytest.mark.parametrize("num_drafts", [0, 3])
async def test_each_answer_has_the_form_and_ends(num_drafts: int) -> None:
    """The script says something else: only a mask can make it end so."""
    async with running_front(num_drafts=num_drafts) as front:
        answers = await ask(front, chat(PLATE, options={"n": 3}))
        assert [bool(re.fullmatch(PLATE.source, a.text)) for a in answers] == [True] * 3
        assert [answer.finish for answer in answers] == ["stop"] * 3
        (answer,) = await ask(front, chat(POINT))
        assert set(json.loads(answer.text)) == {"side", "on"}


@pytest.mark.parametrize("num_drafts", [0, 3])
async def test_what_the_model_would_say_anyway_is_said(num_drafts: int) -> None:
    async with running_front(num_drafts=num_drafts) as front:
        front.script.text = '{"side": "right", "on": true}'
        (free,) = await ask(front, chat())
        (held,) = await ask(front, chat(POINT))
    assert (held.text, held.finish) == (free.text, free.finish)


async def test_free_answers_beside_held_ones_stay_free() -> None:
    async with running_front() as front:
        (held,) = await ask(front, chat(PLATE))
        (free,) = await ask(front, chat())
    assert free.text == front.script.text
    assert held.text != free.text


async def test_texts_are_held_from_their_first_token() -> None:
    async with running_front() as front:
        options = Options(form=Form("choice", '["yes", "no"]', "guided_choice"), n=2)
        answers = await ask(front, TextRequest(options, ("Is it?", "Is it not?")))
    assert [answer.text in ("yes", "no") for answer in answers] == [True] * 4


@pytest.mark.parametrize("num_drafts", [0, 3])
async def test_reasoning_is_free_and_only_the_answer_is_held(num_drafts: int) -> None:
    async with running_front(config=THINKS, num_drafts=num_drafts) as front:
        front.script.text = "<think>Fine weather in Rome.</think>\n\nBlue."
        (answer,) = await ask(front, chat(PLATE))
    assert answer.reasoning == "Fine weather in Rome."
    assert re.fullmatch(PLATE.source, answer.text)


async def test_clients_that_leave_take_their_grammars_state_along() -> None:
    """However a request ends, nothing keeps what followed its answer."""
    async with running_front(delay=0.002) as front:
        front.script.endless = True
        endless = Form("regex", "[a-z ]{400,}", "guided_regex")
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(ask, front, chat(endless, options={"n": 2}))
                while front.state.engine.stats.running < 8:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        await ask(front, chat(PLATE))
        await front.idle()
        front.runner.history.clear()
        while await trio.to_thread.run_sync(num_constraints, front):
            await trio.lowlevel.checkpoint()  # threads let go of their last one after they told it


def num_constraints(front: Front) -> int:
    """Of this front alone: what failed in other tests may be kept by those who report it."""
    gc.collect()
    threads = front.state.constraints._threads
    every = [each for each in gc.get_objects() if type(each) is MatchedConstraint]
    return sum(each._threads is threads for each in every)


async def test_what_is_wrong_with_a_form_is_told_with_its_field() -> None:
    async with running_front() as front:
        with pytest.raises(BadRequestError, match="guided_regex") as refused:
            await ask(front, chat(Form("regex", "[A-", "guided_regex")))
        assert (refused.value.status, refused.value.param) == (400, "guided_regex")


async def test_a_grammar_that_gets_slower_ends_its_own_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each token more can be read in many more ways."""
    monkeypatch.setattr(constraints, "MOST_DEBT", 0.01)
    monkeypatch.setattr(constraints, "DUE", 0.0005)
    ambiguous = Form("lark", 'start: e\ne: e e | "a"', "guided_grammar")
    async with running_front() as front:
        front.script.endless, front.script.text = True, "a"
        with pytest.raises(ApiError, match="takes too long") as refused:
            await ask(front, chat(ambiguous))
        assert refused.value.status == 400
        front.script.endless = False
        (answer,) = await ask(front, chat(PLATE))
        assert answer.finish == "stop"


@pytest.mark.parametrize("kind", ["chat", "text"])
async def test_a_form_has_an_end(kind: str) -> None:
    options = Options(form=PLATE, ignore_eos=True)
    request = TextRequest(options, ("Hi",)) if kind == "text" else chat()
    if isinstance(request, ChatRequest):
        request = chat(PLATE, options={"ignore_eos": True})
    async with running_front() as front:
        with pytest.raises(BadRequestError, match=r"'ignore_eos' cannot be .* 'guided_regex'"):
            await ask(front, request)


class TestSpec:
    """What a chat's answers must be, of its form and its tools."""

    tools = (tool("add"), tool("sub"))

    def calls(self, *names: str, several: bool = True) -> ForcedCalls:
        return ForcedCalls(parser="qwen3_coder", tools=self.tools, names=names, several=several)

    async def check(self, request: ChatRequest, form: Form | None, calls: object) -> None:
        async with running_front() as front:
            spec = chat_spec(front.state.model, request)
        assert (spec and spec.form, spec and spec.calls) == (form, calls)

    async def test_nothing_asked_is_nothing_held(self) -> None:
        await self.check(chat(), None, None)
        await self.check(chat(tools=self.tools), None, None)

    async def test_forced_calls_leave_no_room_for_a_form(self) -> None:
        request = chat(PLATE, tools=self.tools, forced_calls=("sub",))
        await self.check(request, None, self.calls("sub"))

    async def test_one_call_where_several_are_not_wanted(self) -> None:
        request = chat(tools=self.tools, forced_calls=("sub",), parallel_tool_calls=False)
        await self.check(request, None, self.calls("sub", several=False))

    async def test_tools_may_be_called_in_place_of_a_form(self) -> None:
        await self.check(chat(PLATE, tools=self.tools), PLATE, self.calls("add", "sub"))
