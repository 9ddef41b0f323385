from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.config import ConfigError
from kttrio.text import reasoning
from kttrio.text.reasoning import ReasoningSplitter, ReasoningStart
from tests.text.cuts import all_cuts, pieces_of

OPEN, CLOSED, UNSAID = ReasoningStart.OPEN, ReasoningStart.CLOSED, ReasoningStart.UNSAID

CASES = [
    # start, output, reasoning, content
    (OPEN, "Well.\n</think>\n\nHi!", "Well.", "Hi!"),
    (OPEN, "\n\na\n\nb\n\n</think>\n\nHi\n", "a\n\nb", "Hi\n"),
    (OPEN, "<think>\nagain\n</think>ok", "again", "ok"),
    (OPEN, "never ends", "never ends", ""),
    (OPEN, "never ends\n\n", "never ends", ""),
    (OPEN, "cut in the tag\n</thi", "cut in the tag\n</thi", ""),
    (OPEN, "</think>\n\nHi", "", "Hi"),
    (OPEN, "a</think></think>\nb", "a", "b"),
    (OPEN, "a</think>b</think>c", "a", "bc"),
    (OPEN, "a</think>see <think>x</think> and </think>.", "a", "see <think>x</think> and ."),
    (OPEN, "5 < 6 and <b></think>ok", "5 < 6 and <b>", "ok"),
    (OPEN, "call it\n\n<tool_call>\n<f", "call it", "<tool_call>\n<f"),
    (OPEN, "<tool_call>x</tool_call></think>", "", "<tool_call>x</tool_call></think>"),
    (OPEN, "a</think>\nb<tool_call></think>", "a", "b<tool_call></think>"),
    (OPEN, "a</think>b<function=f></think>", "a", "b<function=f></think>"),
    (OPEN, "", "", ""),
    (CLOSED, "Hi <b>", "", "Hi <b>"),
    (CLOSED, "  Hi", "", "  Hi"),
    (CLOSED, "</think>\n\nHi", "", "Hi"),
    (CLOSED, "<think>quoted</think>", "", "<think>quoted</think>"),
    (UNSAID, "<think>\na\n</think>\n\nHi", "a", "Hi"),
    (UNSAID, "\n <think>a</think>Hi", "a", "Hi"),
    (UNSAID, "\n Hi <think>x</think>", "", "\n Hi <think>x</think>"),
    (UNSAID, "<thin ice>", "", "<thin ice>"),
    (UNSAID, "<thi", "", "<thi"),
    (UNSAID, " \n", "", " \n"),
    (UNSAID, "Hi", "", "Hi"),
]


def run(start: ReasoningStart, pieces: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(start)
    parts = [*(splitter.push(piece) for piece in pieces), splitter.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(("start", "text", "thought", "said"), CASES)
def test_every_cut_gives_the_same(start: ReasoningStart, text: str, thought: str, said: str):
    for pieces in all_cuts(text):
        assert run(start, pieces) == (thought, said), pieces


SNIPPETS = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "<function=", "\n", "a", " ", "<", "</th", "b\n\n"]
)


@given(st.sampled_from(ReasoningStart), pieces_of(st.lists(SNIPPETS, max_size=12).map("".join)))
def test_random_cuts_give_the_same(start: ReasoningStart, pieces: list[str]):
    assert run(start, pieces) == run(start, ["".join(pieces)])


@given(st.sampled_from(ReasoningStart), st.text(alphabet="ab <\n"))
def test_no_text_is_lost_but_newlines(start: ReasoningStart, text: str):
    thought, said = run(start, [text])
    assert (thought + said).strip("\n") == text.strip("\n")


def test_reasoning_streams_without_delay():
    splitter = ReasoningSplitter(OPEN)
    assert splitter.push("one") == ("one", "")
    assert splitter.push(" two") == (" two", "")
    assert splitter.push("\n") == ("", "")
    assert splitter.push("three") == ("\nthree", "")
    assert splitter.push("</think>four") == ("", "four")


@pytest.mark.parametrize(
    ("start", "text", "inside"),
    [
        (OPEN, "", True),
        (OPEN, "a", True),
        (OPEN, "a</think>", False),
        (OPEN, "a<tool_call>", False),
        (CLOSED, "", False),
        (UNSAID, "", False),
        (UNSAID, "<think>", True),
        (UNSAID, "a", False),
    ],
)
def test_in_reasoning(start: ReasoningStart, text: str, inside: bool):
    splitter = ReasoningSplitter(start)
    splitter.push(text)
    assert splitter.in_reasoning is inside


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("<|im_start|>assistant\n<think>\n", OPEN),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", CLOSED),
        ("<|im_start|>assistant\n", UNSAID),
        ("user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n", UNSAID),
        ("", UNSAID),
    ],
)
def test_the_prompt_tells_the_start(prompt: str, start: ReasoningStart):
    assert ReasoningStart.of(prompt) is start


def test_detection_and_names():
    assert reasoning.detect("{{- '<think>\\n' }}") == "qwen3"
    assert reasoning.detect("{{- content }}") is None
    assert reasoning.check_name("qwen3") == "qwen3"
    assert reasoning.check_name("off") == "off"
    with pytest.raises(ConfigError, match="--reasoning-parser qwen9: unknown; known are qwen3"):
        reasoning.check_name("qwen9")
