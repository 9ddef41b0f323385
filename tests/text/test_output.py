from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.text.detokenizer import open_detokenizer
from kttrio.text.output import OutputPipeline, Piece, Reasoning, skipped_ids
from kttrio.text.reasoning import FORMATS, ReasoningSplitter, ReasoningStart
from kttrio.text.stops import StopStrings
from kttrio.text.tokenizer import Tokenizer
from kttrio.text.tool_parsers.base import (
    Content,
    ToolCallArguments,
    ToolCallStart,
    open_parser,
)
from tests.text.cuts import pieces_of
from tests.text.family_calls import FAMILY_CALLS
from tests.tokenizers_fake import make_byte_level_backend

QWEN3 = FORMATS["qwen3"]
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = "<tool_call>\n<function=f>\n<parameter=s>\nGrüße\n</parameter>\n</function>\n</tool_call>"


def open_pipeline(
    tokenizer: Tokenizer,
    *,
    stops: tuple[str, ...] = (),
    start: ReasoningStart | None = None,
    tools: bool = False,
    min_tokens: int = 0,
) -> OutputPipeline:
    skip = skipped_ids(tokenizer, kept_tags=QWEN3.tags if start else (), calls=tools)
    return OutputPipeline(
        open_detokenizer(tokenizer, skip_ids=skip),
        stops=StopStrings(stops) if stops else None,
        reasoning=ReasoningSplitter(QWEN3, start) if start else None,
        tools=open_parser("qwen3_coder", []) if tools else None,
        min_tokens=min_tokens,
    )


def pushed(pipeline: OutputPipeline, ids: Iterable[int]) -> list[Piece]:
    """What the tokens make certain, plain text as pieces, too."""
    news = [pipeline.push(id) for id in ids]
    whole = [[Content(new)] * bool(new) if isinstance(new, str) else new for new in news]
    return [piece for pieces in whole for piece in pieces]


def run(
    pipeline: OutputPipeline, tokenizer: Tokenizer, text: str, *, cut_off: bool = False
) -> list[Piece]:
    return pushed(pipeline, tokenizer.encode(text)) + pipeline.finish(cut_off=cut_off)


def summary(pieces: list[Piece]) -> tuple[str, str, list[str], str]:
    """Reasoning, content, names, arguments."""
    return (
        "".join(piece.text for piece in pieces if isinstance(piece, Reasoning)),
        "".join(piece.text for piece in pieces if isinstance(piece, Content)),
        [piece.name for piece in pieces if isinstance(piece, ToolCallStart)],
        "".join(piece.json_fragment for piece in pieces if isinstance(piece, ToolCallArguments)),
    )


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_plain_text_comes_through(tokenizer: Tokenizer, text: str):
    pipeline = open_pipeline(tokenizer)
    assert summary(run(pipeline, tokenizer, text)) == ("", text, [], "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Well.\n</think>\n\nHi.\n" + CALL, ("Well.", "Hi.\n", ["f"], '{"s": "Grüße"}')),
        ("Well.\n" + CALL, ("Well.", "", ["f"], '{"s": "Grüße"}')),
        ("Well. ENDLESS", ("Well. ", "", [], "")),
        ("a</think>b END" + CALL, ("a", "b ", [], "")),
        ("a</think>b <tool", ("a", "b <tool", [], "")),
    ],
)
def test_all_together(tokenizer: Tokenizer, text: str, expected: tuple[str, str, list[str], str]):
    pipeline = open_pipeline(tokenizer, stops=("END",), start=ReasoningStart.OPEN, tools=True)
    assert summary(run(pipeline, tokenizer, text)) == expected
    assert pipeline.num_calls == len(expected[2])
    assert pipeline.matched_stop == ("END" if "END" in text else None)


@pytest.mark.parametrize("closing", ["\n</think>\n\n", "\n"], ids=["closed", "forgotten"])
@pytest.mark.parametrize(("thinks", "tools", "call"), FAMILY_CALLS.values(), ids=FAMILY_CALLS)
def test_reasoning_and_a_call_of_every_family(
    tokenizer: Tokenizer, thinks: str, tools: str, call: str, closing: str
):
    """Also where the model calls without having closed its reasoning."""
    splitter = ReasoningSplitter(FORMATS[thinks], ReasoningStart.OPEN)
    pipeline = OutputPipeline(
        open_detokenizer(tokenizer), reasoning=splitter, tools=open_parser(tools, [TOOL])
    )
    pieces = run(pipeline, tokenizer, "Well." + closing + call)
    assert summary(pieces) == ("Well.", "", ["f"], '{"s": "Grüße"}')


class Texts:
    """A detokenizer whose ids are places in a list of texts."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def push(self, token_id: int) -> str:
        return self.texts[token_id]

    def finish(self) -> str:
        return ""


def run_texts(family: str, texts: list[str], *, cut_off: bool) -> tuple[str, str, list[str], str]:
    thinks, tools, _ = FAMILY_CALLS[family]
    pipeline = OutputPipeline(
        Texts(texts),
        stops=StopStrings(["END", "\n\n\n"]),
        reasoning=ReasoningSplitter(FORMATS[thinks], ReasoningStart.OPEN),
        tools=open_parser(tools, [TOOL]),
    )
    pieces = pushed(pipeline, range(len(texts)))
    return summary(pieces + pipeline.finish(cut_off=cut_off))


@given(st.sampled_from(sorted(FAMILY_CALLS)), st.booleans(), st.data())
def test_any_mess_gives_the_same_in_pieces(family: str, cut_off: bool, data: st.DataObject):
    """Through stops, reasoning and calls at once."""
    parts = re.findall("<[^>]*>|[^<]+", FAMILY_CALLS[family][2])
    snippets = [*parts, *parts, "<think>", "</think>", "END", "EN", "\n", "<", "x"]
    mess = st.lists(st.sampled_from(snippets), max_size=16).map("".join)
    texts = data.draw(pieces_of(mess))
    whole = run_texts(family, ["".join(texts)], cut_off=cut_off)
    assert run_texts(family, texts, cut_off=cut_off) == whole
    assert run_texts(family, list("".join(texts)), cut_off=cut_off) == whole


def test_stop_string_inside_a_call_closes_it(tokenizer: Tokenizer):
    pipeline = open_pipeline(tokenizer, stops=("üß",), tools=True)
    assert summary(run(pipeline, tokenizer, CALL)) == ("", "", ["f"], '{"s": "Gr"}')


def test_cut_off_reaches_the_parser(tokenizer: Tokenizer):
    pipeline = open_pipeline(tokenizer, tools=True)
    pieces = run(pipeline, tokenizer, CALL[: CALL.index("ße")], cut_off=True)
    assert summary(pieces) == ("", "", ["f"], '{"s": "Grü')


def test_held_stop_text_is_released(tokenizer: Tokenizer):
    pipeline = open_pipeline(tokenizer, stops=("END",))
    assert summary(run(pipeline, tokenizer, "the EN"))[1] == "the EN"
    assert pipeline.matched_stop is None


def test_nothing_follows_a_matched_stop(tokenizer: Tokenizer):
    pipeline = open_pipeline(tokenizer, stops=("the",))
    run_to_stop = pushed(pipeline, tokenizer.encode("in the end"))
    assert summary(run_to_stop)[1] == "in "
    assert pipeline.finish() == []


def test_stop_strings_wait_for_the_least_number_of_tokens(tokenizer: Tokenizer):
    ids = tokenizer.encode("in the end, the end")
    first = len(tokenizer.encode("in the end"))
    for min_tokens, said in (
        (0, "in "),
        (first, "in the end, "),
        (len(ids), "in the end, the end"),
    ):
        pipeline = open_pipeline(tokenizer, stops=("the",), min_tokens=min_tokens)
        assert summary(pushed(pipeline, ids) + pipeline.finish())[1] == said
        assert (pipeline.matched_stop is None) is (said == "in the end, the end")


def test_reasoning_tokens_are_counted(tokenizer: Tokenizer):
    pipeline = open_pipeline(tokenizer, start=ReasoningStart.OPEN)
    thought = tokenizer.encode("thinking of it</think>")
    for id in [*thought, *tokenizer.encode("\n\nHi there")]:
        pipeline.push(id)
    assert pipeline.num_reasoning_tokens == len(thought)


def test_skipped_ids(tokenizer: Tokenizer):
    end = tokenizer.token_id("<|im_end|>")
    assert end in skipped_ids(tokenizer, calls=False)
    assert end in skipped_ids(tokenizer, kept_tags=QWEN3.tags, calls=False)
    assert skipped_ids(tokenizer, kept_tags=QWEN3.tags, calls=True) == frozenset()


def test_special_reasoning_tags_are_kept(tokenizer: Tokenizer):
    backend = tokenizer_with_special_think()
    ids = skipped_ids(backend, kept_tags=QWEN3.tags, calls=False)
    assert backend.token_id("</think>") not in ids
    assert backend.token_id("</think>") in skipped_ids(backend, calls=False)


def tokenizer_with_special_think() -> Tokenizer:
    backend = make_byte_level_backend()
    backend.add_special_tokens(["<think>", "</think>"])
    return Tokenizer(backend)


def test_plain_text_comes_as_strings(tokenizer: Tokenizer):
    pipeline = open_pipeline(tokenizer)
    ids = tokenizer.encode("The weather in Paris")
    assert [pipeline.push(id) for id in ids] == [tokenizer.decode([id]) for id in ids]
