"""A tokenizer's vocabulary as llguidance, which computes the masks, takes it.

Special tokens never stand for text there: only a grammar that names one allows it.
"""

from __future__ import annotations

from functools import cached_property

from llguidance import LLTokenizer, TokenizerWrapper

from kttrio.text.grammar_error import GrammarError
from kttrio.text.tokenizer import Tokenizer


class Vocabulary:
    """Takes two seconds for 150,000 tokens. Immutable once built."""

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int]) -> None:
        """Raises GrammarError where no answer can be held to a grammar."""
        if not tokenizer.is_byte_level:
            raise GrammarError("this model's tokenizer is not byte-level: no answer can be forced")
        if not end_ids:
            raise GrammarError("this model has no end token: a forced answer could never end")
        self.tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self.end_ids = end_ids
        self._ids = {token: id for id, token in reversed(list(enumerate(self.tokens)))}
        self.words = LLTokenizer(
            TokenizerWrapper(_Words(tokenizer, self)), eos_token=sorted(end_ids)
        )

    def spell(self, raw: bytes) -> list[int]:
        """Tokens that make up the bytes: one for each of them."""
        return [self._ids[raw[place : place + 1]] for place in range(len(raw))]

    def text_of(self, token: int, skipped_ids: frozenset[int]) -> bytes:
        """The token's share of a text; none of `skipped_ids`, and of ids without a token."""
        known = 0 <= token < len(self.tokens) and token not in skipped_ids
        return self.tokens[token] if known else b""

    @cached_property
    def all_but_ends(self) -> bytes:
        """The mask with every token but the end tokens."""
        mask = bytearray(b"\xff" * (self.words.vocab_size // 8 + 1))
        for id in self.end_ids:
            mask[id // 8] &= ~(1 << id % 8)
        return bytes(mask)


class _Words:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._special_ids = tokenizer.special_ids | vocabulary.end_ids
        self.eos_token_id = min(vocabulary.end_ids)
        self.bos_token_id = None
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted(self._special_ids)

    def __call__(self, raw: bytes) -> list[int]:
        """Tokens of a text that must come, as the model would write it. Encoding reads special
        tokens, and normalises: then they are spelled."""
        ids = self._tokenizer.encode(raw.decode())
        written = b"".join(self.tokens[id] for id in ids)
        if written == raw and self._special_ids.isdisjoint(ids):
            return ids
        return self._vocabulary.spell(raw)
