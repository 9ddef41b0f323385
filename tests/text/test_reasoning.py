from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.config import ConfigError, ServerConfig
from kttrio.text import reasoning
from kttrio.text.reasoning import FORMATS, ReasoningSplitter, ReasoningStart
from tests.text.cuts import all_cuts, pieces_of

OPEN, CLOSED, UNSAID = ReasoningStart.OPEN, ReasoningStart.CLOSED, ReasoningStart.UNSAID

V31_CALL = "<｜tool▁calls▁begin｜>"
V32_CALL = "<｜DSML｜function_calls>"
KIMI_CALL = "<|tool_calls_section_begin|>"

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
    (OPEN, "call it\n\n<tool_call>\n<function=", "call it", "<tool_call>\n<function="),
    (OPEN, "call it\n<tool_call>{", "call it", "<tool_call>{"),
    (OPEN, "<tool_call><function=f></think>", "", "<tool_call><function=f></think>"),
    (OPEN, "a\n<tool_call>\nis the tag\n</think>b", "a\n<tool_call>\nis the tag", "b"),
    (OPEN, "cut in a call\n<tool_call>\n<fun", "cut in a call\n<tool_call>\n<fun", ""),
    (OPEN, "a</think>\nb<tool_call></think>", "a", "b<tool_call></think>"),
    (OPEN, "a</think>b<function=f></think>", "a", "b<function=f></think>"),
    (OPEN, "", "", ""),
    (CLOSED, "Hi <b>", "", "Hi <b>"),
    (CLOSED, "  Hi", "", "  Hi"),
    (CLOSED, "\n\n  Hi", "", "  Hi"),
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


FAMILY_CASES = [
    # parser, start, output, reasoning, content
    ("qwen3", OPEN, "no <function=f> yet</think>ok", "no <function=f> yet", "ok"),
    ("deepseek-r1", OPEN, "<think>\nwhy</think>\n\nHi", "why", "Hi"),
    ("deepseek-r1", OPEN, f"a\n{V31_CALL}f", "a", f"{V31_CALL}f"),
    ("deepseek-r1", OPEN, "a <tool_call> b</think>c", "a <tool_call> b", "c"),
    ("deepseek-v3", OPEN, f"a</think>b\n\n{V32_CALL}</think>", "a", f"b\n\n{V32_CALL}</think>"),
    ("deepseek-v3", OPEN, f"a\n\n{V32_CALL}\n", "a", f"{V32_CALL}\n"),
    ("deepseek-v3", CLOSED, f"b\n\n{V32_CALL}", "", f"b\n\n{V32_CALL}"),
    ("deepseek-v3", UNSAID, "Hi <think>", "", "Hi <think>"),
    ("glm45", UNSAID, "\n<think>a</think>\nb<tool_call>f", "a", "b<tool_call>f"),
    ("glm45", OPEN, "a<tool_call>f\n<arg_key>", "a", "<tool_call>f\n<arg_key>"),
    ("kimi", UNSAID, "<think>a</think>b", "a", "b"),
    ("kimi", UNSAID, "◁think▷a◁/think▷b", "a", "b"),
    ("kimi", OPEN, "a◁b" + KIMI_CALL, "a◁b", KIMI_CALL),
    ("minimax", OPEN, "a\n<minimax:tool_call>\n<invoke", "a", "<minimax:tool_call>\n<invoke"),
    ("minimax", OPEN, "a <minimax:tool_call> b</think>c", "a <minimax:tool_call> b", "c"),
    ("minimax", OPEN, "a\n</think>\n\nb", "a", "b"),
]


def run(start: ReasoningStart, pieces: list[str], parser: str = "qwen3") -> tuple[str, str]:
    splitter = ReasoningSplitter(FORMATS[parser], start)
    parts = [*(splitter.push(piece) for piece in pieces), splitter.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(("start", "text", "thought", "said"), CASES)
def test_every_cut_gives_the_same(start: ReasoningStart, text: str, thought: str, said: str):
    for pieces in all_cuts(text):
        assert run(start, pieces) == (thought, said), pieces


@pytest.mark.parametrize(("parser", "start", "text", "thought", "said"), FAMILY_CASES)
def test_every_cut_gives_the_same_in_every_family(
    parser: str, start: ReasoningStart, text: str, thought: str, said: str
):
    for pieces in all_cuts(text):
        assert run(start, pieces, parser) == (thought, said), pieces


SNIPPETS = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "<function=", "\n", "a", " ", "<", "</th", "b\n\n"),
        *("◁think▷", "◁/think▷", "◁", V31_CALL, V32_CALL, V32_CALL[:5], KIMI_CALL, "<|"),
    ]
)


@given(
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from(ReasoningStart),
    pieces_of(st.lists(SNIPPETS, max_size=12).map("".join)),
)
def test_random_cuts_give_the_same(parser: str, start: ReasoningStart, pieces: list[str]):
    assert run(start, pieces, parser) == run(start, ["".join(pieces)], parser)


@given(st.sampled_from(ReasoningStart), st.text(alphabet="ab <\n"))
def test_no_text_is_lost_but_newlines(start: ReasoningStart, text: str):
    thought, said = run(start, [text])
    assert (thought + said).strip("\n") == text.strip("\n")


@pytest.mark.parametrize("parser", FORMATS)
def test_without_tools_no_call_ends_the_reasoning(parser: str):
    (tag, *_), (go_on, *_) = FORMATS[parser].calls, (*FORMATS[parser].calls_go_on, "f")
    splitter = ReasoningSplitter(FORMATS[parser], OPEN, calls=False)
    assert splitter.push(f"a {tag}{go_on}b</think>c") == (f"a {tag}{go_on}b", "c")


def test_reasoning_streams_without_delay():
    splitter = ReasoningSplitter(FORMATS["qwen3"], OPEN)
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
        (OPEN, "a<tool_call>", True),
        (OPEN, "a<tool_call>{", False),
        (CLOSED, "", False),
        (UNSAID, "", False),
        (UNSAID, "<think>", True),
        (UNSAID, "a", False),
    ],
)
def test_in_reasoning(start: ReasoningStart, text: str, inside: bool):
    splitter = ReasoningSplitter(FORMATS["qwen3"], start)
    splitter.push(text)
    assert splitter.in_reasoning is inside


@pytest.mark.parametrize(
    ("parser", "prompt", "start"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n", OPEN),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", CLOSED),
        ("qwen3", "<|im_start|>assistant\n", UNSAID),
        ("qwen3", "user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n", UNSAID),
        ("qwen3", "", UNSAID),
        ("deepseek-r1", "<｜Assistant｜>", OPEN),
        ("deepseek-r1", "<｜Assistant｜><think>\n\n</think>\n\n", CLOSED),
        ("deepseek-v3", "<｜Assistant｜><think>", OPEN),
        ("deepseek-v3", "<｜Assistant｜></think>", CLOSED),
        ("deepseek-v3", "<｜Assistant｜>", UNSAID),
        ("deepseek-v3", "</function_results>\n\n<think>", OPEN),
        ("glm45", "<|assistant|>", UNSAID),
        ("glm45", "<|assistant|>\n<think></think>", CLOSED),
        ("kimi", "<|im_assistant|>assistant<|im_middle|>", UNSAID),
        ("minimax", "]~b]ai\n<think>\n", OPEN),
    ],
)
def test_the_prompt_tells_the_start(parser: str, prompt: str, start: ReasoningStart):
    assert FORMATS[parser].start(prompt) is start


@pytest.mark.parametrize(
    ("taught", "parser"),
    [
        ("{{- '<think>\\n' }}", "qwen3"),
        ("{{ content.split('</think>') }}", "qwen3"),
        ("{{- content }}", None),
        ("<|im_middle|>{{ content }}", None),
        ("<|im_middle|><think></think>", "kimi"),
        ("<|im_middle|>◁think▷", "kimi"),
        ("<|observation|> <tool_call> <think></think>", "glm45"),
        ("{{ '<｜Assistant｜><think>\\n' }}", "deepseek-r1"),
        ("{{ '<｜Assistant｜>' }}{{ '</think>' }}", "deepseek-v3"),
        ("{%- set begin = '<minimax:tool_call>' -%}<think>", "minimax"),
    ],
)
def test_the_template_tells_the_family(taught: str, parser: str | None):
    assert reasoning.detect(taught) == parser


@pytest.mark.parametrize("name", [*FORMATS, "off"])
def test_names(name: str):
    assert reasoning.check_name(name) == name


def test_names_of_other_servers():
    assert reasoning.check_name("kimi_k2") == "kimi"
    assert reasoning.check_name("qwen3-thinking") == "qwen3"
    assert reasoning.check_name("deepseek_r1") == "deepseek-r1"


def test_the_flags_help_names_every_parser():
    (flag,) = (field for field in fields(ServerConfig) if field.name == "reasoning_parser")
    assert ", ".join((*sorted(FORMATS), reasoning.OFF)) in flag.metadata["help"]


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match="--reasoning-parser qwen9: unknown; known are deepseek"):
        reasoning.check_name("qwen9")


@pytest.mark.parametrize(
    ("said", "start"),
    [
        ("One, two", ReasoningStart.CLOSED),
        ("<think>\nTwo", ReasoningStart.OPEN),
        ("<think>\nTwo\n</think>\n\nOne", ReasoningStart.CLOSED),
        ("<think>a</think>b<think>c", ReasoningStart.OPEN),
    ],
)
def test_an_answer_that_goes_on_is_where_its_tags_say(said: str, start: ReasoningStart):
    for parser in FORMATS:
        assert FORMATS[parser].start(f"<think>{said}", said=said) is start
