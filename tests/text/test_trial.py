from __future__ import annotations

import os
import time

import pytest
from llguidance import LLMatcher

from kttrio.text import trial
from kttrio.text.trial import Trial

GOOD = LLMatcher.grammar_from_regex("[ab]+")
ENDLESS = LLMatcher.grammar_from_json_schema(
    {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(40)]}
)


@pytest.fixture
def judge() -> Trial:
    return Trial({"max_lexer_states": 1000}, {"<|x|>": 3}, 10)


def chain(num: int) -> str:
    rules = "".join(f"r{i}: r{i + 1}\n" for i in range(num))
    return LLMatcher.grammar_from_lark(f'start: r0\n{rules}r{num}: "a"')


def test_a_good_grammar_is_not_complained_of(judge: Trial):
    assert judge.complaint(GOOD) == ""
    assert judge.complaint(LLMatcher.grammar_from_lark("start: <|x|> <[9]>")) == ""


def test_a_bad_one_is_in_the_library_s_words(judge: Trial):
    assert "unclosed group" in judge.complaint(LLMatcher.grammar_from_regex("a("))
    assert "unknown special token" in judge.complaint(LLMatcher.grammar_from_lark("start: <|y|>"))


def test_one_that_overflows_the_stack_kills_only_the_process(judge: Trial):
    assert "too deep" in judge.complaint(chain(3000))
    assert judge.complaint(GOOD) == ""


def test_one_that_takes_too_long_is_given_up(judge: Trial, monkeypatch: pytest.MonkeyPatch):
    assert judge.complaint(GOOD) == ""
    with monkeypatch.context() as patch:
        patch.setattr(trial, "SECONDS", 0.3)
        begun = time.monotonic()
        assert "more than 0.3 s" in judge.complaint(ENDLESS)
    assert time.monotonic() - begun < 10
    assert judge.complaint(GOOD) == ""


def test_the_process_goes_when_it_is_not_needed_any_more(judge: Trial):
    judge.complaint(GOOD)
    process = judge._process
    assert process is not None
    judge._stop()
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
