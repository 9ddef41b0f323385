"""The training texts: repeatable, true to the template, their code runs, nothing held out leaks."""

from __future__ import annotations

import re

import pytest

from tools.demo import corpus

TALKS = corpus.conversations(1, 3000)


def test_the_same_seed_makes_the_same_texts():
    assert corpus.conversations(5, 50) == corpus.conversations(5, 50)
    assert corpus.conversations(5, 50) != corpus.conversations(6, 50)


@pytest.mark.parametrize("function", corpus.FUNCTIONS, ids=lambda f: f["name"])
def test_taught_functions_are_right(function, capsys):
    space = {}
    exec(function["code"], space)
    assert function["name"] in space
    assert function["checks"]
    assert all(eval(check, space) for check in function["checks"])


def test_no_held_out_name_is_ever_said():
    held_out = re.compile(r"\b(" + "|".join(map(re.escape, corpus.HELD_OUT)) + r")\b")
    for talk in TALKS:
        for message in talk.messages:
            assert not held_out.search(message["content"].lower())


def test_every_argument_is_copied_from_the_question():
    calls = 0
    for talk in TALKS:
        for before, message in zip(talk.messages, talk.messages[1:], strict=False):
            for call in message.get("tool_calls", []):
                calls += 1
                for value in call["function"]["arguments"].values():
                    assert value.lower() in before["content"].lower()
                names = [tool["function"]["name"] for tool in talk.tools]
                assert call["function"]["name"] in names
    assert calls > 800


def test_held_out_wordings_are_not_taught():
    held_out = {fact["held_out"] for fact in corpus.QUESTIONS}
    said = {message["content"] for talk in TALKS for message in talk.messages}
    assert not held_out & said
