"""The bench of held answers, as a whole and short."""

from __future__ import annotations

import json

import pytest

from kttrio.config import ConfigError
from tools.bench import masks, words
from tools.bench.words import make_tokenizer


def test_every_subject_is_measured_free_and_held(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(masks, "ROUNDS", 1)
    file = tmp_path / "masks.json"
    flags = ["--streams", "2", "--seconds", "0.2", "--step-ms", "1", "--vocabulary", "2000"]
    assert masks.run([*flags, "--json", str(file)]) == 0
    records = json.loads(file.read_text())
    assert [record["streams"] for record in records] == [1, 2, 1, 2]
    for record in records:
        assert min(record["free"], record["held"]) > 0
        assert record["made_p99"] >= record["made_median"] > 0
        assert record["waited_p99"] >= record["waited_median"] >= 0
    assert "demo model" in capsys.readouterr().out


def test_the_tokenizer_is_as_large_as_it_is_asked_to_be():
    tokenizer = make_tokenizer(3000)
    assert tokenizer.vocab_size == 3000
    assert tokenizer.eos_ids == {2999}
    text = "def add(a, b): return a + b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_more_words_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(words, "_words", lambda: ["two", "words"])
    with pytest.raises(ConfigError, match="--vocabulary: no more than 262 words"):
        make_tokenizer(1000)
