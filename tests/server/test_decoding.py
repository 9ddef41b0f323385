"""Token events to deltas: what is said when, and why an answer ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from kttrio.request import FinishReason, TokenEvent, TokenLogprob
from kttrio.server.decoding import Answer, Call, CallDelta, Decoder, Delta, Said, changes
from kttrio.text.detokenizer import open_detokenizer
from kttrio.text.output import OutputPipeline
from kttrio.text.stops import StopStrings
from kttrio.text.tokenizer import Tokenizer
from kttrio.text.tool_parsers.base import open_parser
from tests.tokenizers_fake import make_tiny_tokenizer

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(make_tiny_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))))


def decoder(tokenizer: Tokenizer, *stops: str, calls: bool = False) -> Decoder:
    pipeline = OutputPipeline(
        open_detokenizer(tokenizer),
        stops=StopStrings(stops) if stops else None,
        tools=open_parser("qwen3_coder", [], new_id=lambda: "id") if calls else None,
    )
    return Decoder(pipeline)


def feed_all(
    decoder: Decoder, ids: list[int], finish: FinishReason, *, scores: bool = False
) -> list[Delta]:
    """All deltas; text alone as a Delta, too. Stops where the answer ends."""
    deltas: list[Delta] = []
    for i, token in enumerate(ids):
        score = TokenLogprob(token, -1.0) if scores else None
        news = decoder.feed(TokenEvent(token, finish if i == len(ids) - 1 else None, score))
        deltas += [Delta(news)] * bool(news) if isinstance(news, str) else news
        if deltas and deltas[-1].finish:
            break
    return deltas


def test_text_alone_comes_as_a_string(tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode("a")
    assert decoder(tokenizer).feed(TokenEvent(token)) == "a"


def test_half_a_character_is_nothing_yet(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ÿ")
    assert len(ids) == 2
    one = decoder(tokenizer)
    assert one.feed(TokenEvent(ids[0])) == ""
    assert one.feed(TokenEvent(ids[1])) == "ÿ"
    cut = feed_all(decoder(tokenizer), ids[:1], LENGTH)
    assert cut == [Delta("\ufffd", finish="length", calls=[], logprobs=[])]


def test_a_stop_token_is_counted_but_not_said(tokenizer: Tokenizer) -> None:
    end_id = min(tokenizer.eos_ids)
    one = decoder(tokenizer)
    answer = Answer.of(feed_all(one, [*tokenizer.encode("ab"), end_id], STOP))
    assert (answer.text, answer.finish, answer.matched_stop) == ("ab", "stop", end_id)
    assert one.num_tokens == len(tokenizer.encode("ab")) + 1


def test_a_stop_string_completed_by_the_last_token_wins(tokenizer: Tokenizer) -> None:
    answer = Answer.of(feed_all(decoder(tokenizer, "b."), tokenizer.encode("ab."), LENGTH))
    assert (answer.text, answer.finish, answer.matched_stop) == ("a", "stop", "b.")


def test_a_stop_string_that_does_not_come_is_released(tokenizer: Tokenizer) -> None:
    answer = Answer.of(feed_all(decoder(tokenizer, "b.!"), tokenizer.encode("ab."), LENGTH))
    assert (answer.text, answer.finish, answer.matched_stop) == ("ab.", "length", None)


def test_no_score_is_lost_while_text_is_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\u00ff b. c")
    deltas = feed_all(decoder(tokenizer, "b. x"), ids, LENGTH, scores=True)
    assert [score.token for delta in deltas for score in delta.logprobs] == ids
    assert len(deltas) < len(ids)


def test_prompt_scores_come_even_without_text(tokenizer: Tokenizer) -> None:
    scores = (None, TokenLogprob(5, -1.0))
    (delta,) = decoder(tokenizer).feed(TokenEvent(None, LENGTH, None, scores))
    assert isinstance(delta, Delta)
    assert (delta.prompt_logprobs, delta.finish, delta.text) == (scores, "length", "")


class Whole:
    """A detokenizer of one token."""

    def __init__(self, text: str) -> None:
        self._text = text

    def push(self, token_id: int) -> str:
        return self._text

    def finish(self) -> str:
        return ""


def test_an_answer_that_ends_before_a_second_call_has_met_no_stop_behind_it() -> None:
    tools = open_parser("qwen3_coder", [])
    whole = Whole("<function=f></function><function=f>the END")
    pipeline = OutputPipeline(whole, stops=StopStrings(["END"]), tools=tools)
    (delta,) = Decoder(pipeline, one_call=True).feed(TokenEvent(0))
    assert isinstance(delta, Delta)
    assert (delta.finish, delta.matched_stop) == ("tool_calls", None)


def test_text_and_calls_keep_their_order_within_one_step() -> None:
    tools = open_parser("qwen3_coder", [], new_id=lambda: "id")
    whole = Whole("First <function=f></function> and <function=g></function> then")
    pipeline = OutputPipeline(whole, tools=tools)
    deltas = Decoder(pipeline).feed(TokenEvent(0, LENGTH, TokenLogprob(0, -1.0)))
    assert not isinstance(deltas, str)
    said = [[type(change) for change in changes(delta)] for delta in deltas]
    assert said == [[Said, CallDelta, CallDelta]] * 2 + [[Said]]
    answer = Answer.of(deltas)
    first, f, between, g, last = answer.parts
    assert (f, g) == (Call("id", "f", "{}"), Call("id", "g", "{}"))
    assert first == Said("First ", [TokenLogprob(0, -1.0)])
    assert answer.text == "First " + between.text + last.text
    assert (answer.finish, answer.logprobs) == ("length", [TokenLogprob(0, -1.0)])


@pytest.mark.parametrize(("finish", "reason"), [(STOP, "tool_calls"), (LENGTH, "length")])
def test_calls_decide_the_reason_only_when_the_model_stopped(
    tokenizer: Tokenizer, finish: FinishReason, reason: str
) -> None:
    text = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    ids = [*tokenizer.encode(text), min(tokenizer.eos_ids)]
    answer = Answer.of(feed_all(decoder(tokenizer, calls=True), ids, finish))
    assert answer.finish == reason
    (call,) = answer.calls
    assert (call.id, call.name, call.arguments) == ("id", "f", '{"a": "1"}')
