from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.text.gate import Gate, Way
from kttrio.text.reasoning import FORMATS, ReasoningSplitter, ReasoningStart

SNIPPETS = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "<function=", "{", "\n", "a", " ", "<", "</th"),
        *(
            "◁think▷",
            "◁/think▷",
            "◁",
            "<｜tool▁calls▁begin｜>",
            "<｜DSML｜",
            "é",
            "\u3000",
            "ink>x",
        ),
        *("<minimax:tool_call>", "<invoke", "\n\n", "b\n", "function_calls>", "<|tool_calls_"),
    ]
)


def answer_of(gate: Gate | bytes, pieces: list[bytes]) -> bytes | None:
    """What the gate lets through; None while it is closed."""
    for number, piece in enumerate(pieces):
        gate = gate.push(piece)
        if isinstance(gate, bytes):
            return gate + b"".join(pieces[number + 1 :])
    return None


def content_of(splitter: ReasoningSplitter, text: str) -> str:
    return splitter.push(text)[1]


@given(
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from(ReasoningStart),
    st.booleans(),
    st.lists(SNIPPETS, max_size=10).map("".join),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_it_opens_where_content_begins(
    parser: str, start: ReasoningStart, calls: bool, text: str, sizes: list[int]
):
    splitter = ReasoningSplitter(FORMATS[parser], start, calls=calls, forced=True)
    raw, pieces = text.encode(), []
    while raw:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(raw[:size])
        raw = raw[size:]
    answer = answer_of(Way(FORMATS[parser], calls).gate(start), pieces)
    assert (answer or b"").decode() == content_of(splitter, text)
    assert answer != b""


@pytest.mark.parametrize("parser", FORMATS)
def test_the_same_place_is_the_same_gate(parser: str):
    way = Way(FORMATS[parser], calls=True)
    gate = way.gate(ReasoningStart.OPEN)
    assert (
        gate.push(b"hm, ")
        == gate.push(b"well")
        == Way(FORMATS[parser], True).gate(ReasoningStart.OPEN)
    )


def test_a_character_in_parts_is_waited_for():
    gate = Way(FORMATS["kimi"], calls=False).gate(ReasoningStart.UNSAID)
    tag = "◁think▷".encode()
    assert answer_of(gate, [tag[:1], tag[1:5], tag[5:], "◁/think▷é".encode()]) == "é".encode()
