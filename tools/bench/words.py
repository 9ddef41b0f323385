"""A tokenizer as large as a model's, of the words in Python's own library; none is downloaded."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from kttrio.config import ConfigError
from kttrio.text.byte_level import piece_of
from kttrio.text.tokenizer import Tokenizer

END = "<|end|>"
_WORD = re.compile(rb" ?[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]{1,4}|\s{1,8}")


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE: each byte, words with all their beginnings, and an end token."""
    pieces = {piece_of(bytes([byte])): byte for byte in range(256)}
    merges = []
    beginnings = (word[:end] for word in _words() for end in range(2, len(word) + 1))
    for piece in beginnings:
        if len(pieces) >= vocab_size - 1:
            break
        if piece not in pieces:
            pieces[piece] = len(pieces)
            merges.append((piece[:-1], piece[-1]))
    else:
        raise ConfigError(f"--vocabulary: no more than {len(pieces)} words are found here")
    backend = tokenizers.Tokenizer(models.BPE(vocab=pieces, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(END, special=True, normalized=False)])
    return Tokenizer(backend, eos_ids=frozenset({len(pieces)}))


def _words() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in file.parts:
            yield from map(piece_of, _WORD.findall(file.read_bytes()))
