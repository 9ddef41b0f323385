from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.text.detokenizer import Detokenizer, open_detokenizer
from kttrio.text.tokenizer import Tokenizer
from tests.tokenizers_fake import (
    make_byte_fallback_backend,
    make_byte_level_backend,
    make_metaspace_backend,
)

BYTE_LEVEL = Tokenizer(make_byte_level_backend())
METASPACE = Tokenizer(make_metaspace_backend())
BYTE_FALLBACK = Tokenizer(make_byte_fallback_backend())

TEXTS = ("Grüße 😀!", "a  b\n\n  c", "東京 \U0001d4b3 e\u0301", " the cats", "")


def run(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 20)))
def test_byte_level_equals_the_whole_decode_for_any_ids(ids: list[int]):
    assert "".join(run(open_detokenizer(BYTE_LEVEL), ids)) == BYTE_LEVEL.decode(ids)


@given(st.lists(st.binary(min_size=1, max_size=1)))
def test_byte_level_equals_the_whole_decode_for_single_bytes(raw: list[bytes]):
    by_bytes = {BYTE_LEVEL.token_bytes(id): id for id in range(BYTE_LEVEL.vocab_size)}
    ids = [by_bytes[byte] for byte in raw]
    text = "".join(run(open_detokenizer(BYTE_LEVEL), ids))
    assert text == BYTE_LEVEL.decode(ids) == b"".join(raw).decode(errors="replace")


@given(st.lists(st.integers(0, METASPACE.vocab_size + 3)))
def test_metaspace_equals_the_whole_decode_for_any_ids(ids: list[int]):
    assert "".join(run(open_detokenizer(METASPACE), ids)) == METASPACE.decode(ids)


@given(st.text(alphabet=" asthecé東😀"))
def test_byte_fallback_equals_the_whole_decode_for_any_text(text: str):
    ids = BYTE_FALLBACK.encode(text.replace(" ", "\u2581"))
    assert "".join(run(open_detokenizer(BYTE_FALLBACK), ids)) == BYTE_FALLBACK.decode(ids)


@given(st.lists(st.integers(0, BYTE_FALLBACK.vocab_size), max_size=60))
def test_byte_fallback_survives_any_bytes(ids: list[int]):
    pieces = run(open_detokenizer(BYTE_FALLBACK), ids)
    assert "".join(pieces).count("the") == BYTE_FALLBACK.decode(ids).count("the")


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE, BYTE_FALLBACK])
@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_splits_a_character(tokenizer: Tokenizer, text: str):
    pieces = run(open_detokenizer(tokenizer), tokenizer.encode(text))
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_comes_out_at_the_end():
    ids = [BYTE_LEVEL.encode("😀")[0]] if len(BYTE_LEVEL.encode("😀")) > 1 else []
    ids = ids or BYTE_LEVEL.encode("\x80")[:1]
    detokenizer = open_detokenizer(BYTE_LEVEL)
    assert [detokenizer.push(id) for id in ids] == [""]
    assert detokenizer.finish() == "\ufffd"


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, METASPACE])
def test_skipped_ids_leave_no_text(tokenizer: Tokenizer):
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    ids = [end, *tokenizer.encode("The weather"), end]
    plain = open_detokenizer(tokenizer)
    assert "".join(run(plain, ids)).count("<|im_end|>") == 2
    skipping = open_detokenizer(tokenizer, skip_ids=tokenizer.special_ids)
    assert "".join(run(skipping, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_window_stays_short_on_endless_replacement_characters():
    detokenizer = open_detokenizer(METASPACE)
    broken = METASPACE.token_id("\ufffd")
    assert broken is not None
    pieces = [detokenizer.push(broken) for _ in range(100)]
    assert len("".join(pieces)) == 97
    assert detokenizer.finish() == "\ufffd" * 3
