from __future__ import annotations

from kttrio.engine.sequence import Sequence
from kttrio.plan import ChunkResult
from kttrio.request import FinishReason, GenerateRequest, SamplingParams, TokenLogprob


def make(num_prompt=10, page_size=4, **sampling) -> Sequence:
    params = SamplingParams(**{"max_tokens": 5, "seed": 0, **sampling})
    request = GenerateRequest("r", tuple(range(num_prompt)), params)
    sequence = Sequence(request, page_size=page_size, max_outputs=params.max_tokens)
    sequence.slot, sequence.pages = 3, tuple(range(100, 100 + sequence.num_pages))
    return sequence


def test_pages_cover_all_that_is_ever_computed():
    assert make(num_prompt=8, max_tokens=0).num_pages == 2
    assert make(num_prompt=8, max_tokens=1).num_pages == 2  # the last output is never fed back
    assert make(num_prompt=8, max_tokens=2).num_pages == 3


def test_chunks_follow_each_other_and_carry_the_pages_they_reach():
    sequence = make()
    first = sequence.prompt_chunk(6)
    assert (first.slot, first.start, first.token_ids) == (3, 0, tuple(range(6)))
    assert (first.pages, first.sample) == ((100, 101), False)
    assert sequence.advance(first, ChunkResult(None)) is None
    second = sequence.prompt_chunk(6)
    assert (second.start, second.token_ids, second.sample) == (6, (6, 7, 8, 9), True)
    assert second.pages == (100, 101, 102)
    event = sequence.advance(second, ChunkResult(77))
    assert event is not None
    assert (event.token, event.finish) == (77, None)
    decode = sequence.decode_chunk()
    assert (decode.start, decode.token_ids, decode.sample) == (10, (77,), True)
    assert decode.num_prompt_tokens == 10


def test_page_table_is_the_same_tuple_within_a_page():
    sequence = make(num_prompt=8, max_tokens=6)
    sequence.advance(sequence.prompt_chunk(8), ChunkResult(1))
    tables = []
    for _ in range(5):
        chunk = sequence.decode_chunk()
        tables.append(chunk.pages)
        sequence.advance(chunk, ChunkResult(1))
    assert tables[0] is tables[1] is tables[2] is tables[3]
    assert [len(table) for table in tables] == [3, 3, 3, 3, 4]


def test_stop_token_counts_from_min_tokens_on():
    sequence = make(max_tokens=9, stop_token_ids=frozenset({7}), min_tokens=2)
    event = sequence.advance(sequence.prompt_chunk(99), ChunkResult(7))
    assert event is not None
    assert event.finish is None
    event = sequence.advance(sequence.decode_chunk(), ChunkResult(7))
    assert event is not None
    assert (event.token, event.finish) == (7, FinishReason.STOP)


def test_stop_wins_over_length():
    sequence = make(max_tokens=1, stop_token_ids=frozenset({7}))
    event = sequence.advance(sequence.prompt_chunk(99), ChunkResult(7))
    assert event is not None
    assert event.finish is FinishReason.STOP


def test_prompt_logprobs_are_gathered_over_chunks_and_sent_once():
    sequence = make(num_prompt=4, prompt_logprobs=0)
    scores = tuple(TokenLogprob(token, -float(token)) for token in range(1, 4))
    assert sequence.advance(sequence.prompt_chunk(2), ChunkResult(None, None, scores[:1])) is None
    event = sequence.advance(sequence.prompt_chunk(2), ChunkResult(9, None, scores[1:]))
    assert event is not None
    assert event.prompt_logprobs == (None, *scores)
    event = sequence.advance(sequence.decode_chunk(), ChunkResult(9))
    assert event is not None
    assert event.prompt_logprobs is None


def test_scoring_ends_without_a_token():
    sequence = make(num_prompt=2, max_tokens=0, prompt_logprobs=0)
    chunk = sequence.prompt_chunk(9)
    assert not chunk.sample
    event = sequence.advance(chunk, ChunkResult(None, None, (TokenLogprob(1, -1.0),)))
    assert event is not None
    assert (event.token, event.finish) == (None, FinishReason.LENGTH)
    assert event.prompt_logprobs == (None, TokenLogprob(1, -1.0))


def test_missing_token_ends_the_sequence_with_an_error():
    sequence = make()
    event = sequence.advance(sequence.prompt_chunk(99), ChunkResult(None))
    assert event is not None
    assert event.finish is FinishReason.ERROR
    assert event.error is not None
