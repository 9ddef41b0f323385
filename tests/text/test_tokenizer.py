from __future__ import annotations

import json
from pathlib import Path

import pytest

from kttrio.config import ConfigError
from kttrio.text.tokenizer import EncodeError, Tokenizer
from tests.tokenizers_fake import make_byte_fallback_backend, make_byte_level_backend


def test_round_trip(tokenizer: Tokenizer):
    text = "Grüße 😀\n\tdef f(): return 東京"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_text_are_one_token(tokenizer: Tokenizer):
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    ids = tokenizer.encode("<|im_start|>user<|im_end|>")
    assert (ids[0], ids[-1]) == (start, end)
    assert tokenizer.special_ids >= {start, end}
    assert tokenizer.token_id("<tool_call>") not in tokenizer.special_ids


def test_decode_can_leave_special_tokens_out(tokenizer: Tokenizer):
    ids = tokenizer.encode("Hi<|im_end|>")
    assert tokenizer.decode(ids) == "Hi<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hi"


def test_raw_prompts_may_get_what_the_post_processor_adds(tokenizer: Tokenizer):
    assert tokenizer.encode("Hi", add_special_tokens=True) == tokenizer.encode("Hi")


def test_end_tokens_come_from_every_file(checkpoint: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 6, "text_config": {"eos_token_id": 7}}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_ids == {1, 5, 6, 7, tokenizer.token_id("<|im_end|>")}


def test_truncation_in_the_file_is_not_obeyed(checkpoint: Path, tmp_path: Path):
    backend = make_byte_level_backend()
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("The weather in Paris")) == "The weather in Paris"


@pytest.mark.parametrize("text", ["é", "😀", " the", "\x00\x1f\x7f\xad"])
def test_bytes_of_the_tokens_make_the_text(tokenizer: Tokenizer, text: str):
    raw = b"".join(tokenizer.token_bytes(id) for id in tokenizer.encode(text))
    assert raw == text.encode()


def test_pieces_of_byte_level_tokens(tokenizer: Tokenizer):
    halves = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
    assert tokenizer.piece(halves[b" the"]) == " the"
    assert tokenizer.piece(halves[b"\xe6"]) == "bytes:\\xe6"
    assert tokenizer.piece(tokenizer.encode("<|im_end|>")[0]) == "<|im_end|>"
    assert tokenizer.piece(tokenizer.vocab_size + 1) == ""
    assert tokenizer.token_bytes(-1) == b""


def test_pieces_of_byte_fallback_tokens():
    tokenizer = Tokenizer(make_byte_fallback_backend())
    ids = tokenizer.encode("\u2581the\u2581cat")
    assert tokenizer.piece(ids[0]).startswith(" ")
    assert b"".join(tokenizer.token_bytes(id) for id in ids) == b" the cat"
    newline = tokenizer.token_id("<0x0A>")
    assert newline is not None
    assert tokenizer.token_bytes(newline) == b"\n"


def test_added_token_outside_the_alphabet_keeps_its_bytes():
    backend = make_byte_level_backend()
    backend.add_tokens(["<\uff5cend of text\uff5c>"])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("<\uff5cend of text\uff5c>")
    assert len(ids) == 1
    assert tokenizer.token_bytes(ids[0]) == "<\uff5cend of text\uff5c>".encode()
    assert tokenizer.decode(ids) == "<\uff5cend of text\uff5c>"


def test_lone_surrogate_is_refused_by_name(tokenizer: Tokenizer):
    with pytest.raises(EncodeError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800c")


def test_missing_tokenizer_names_the_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json: missing"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"model": {"type": "none"}}', b"\xff\xfe"])
def test_corrupt_tokenizer_names_the_file(tmp_path: Path, content: bytes):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not .*download it again"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_corrupt_neighbour_names_the_file(
    checkpoint: Path, tmp_path: Path, name: str, content: str
):
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        Tokenizer.load(tmp_path)


def test_vocabulary_covers_the_highest_id(tokenizer: Tokenizer, checkpoint: Path):
    file = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
    highest = max(*file["model"]["vocab"].values(), *(t["id"] for t in file["added_tokens"]))
    assert tokenizer.vocab_size == highest + 1
