"""Turns a running stream of token ids into text that never splits a character.

Not here: stop strings, tags and tool calls; they read the text that leaves this place.
"""

from __future__ import annotations

import codecs
from typing import Protocol

from kttrio.text.tokenizer import Tokenizer

_MAX_CHARACTER_TOKENS = 4
"""UTF-8 has at most four bytes per character, so no character needs more tokens."""
_MAX_CONTEXT_TOKENS = 8


class Detokenizer(Protocol):
    """One stream's way from ids to text."""

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        ...

    def finish(self) -> str:
        """What was held back, an incomplete character as U+FFFD. No push may follow."""
        ...


def open_detokenizer(
    tokenizer: Tokenizer, *, skip_ids: frozenset[int] = frozenset()
) -> Detokenizer:
    """A detokenizer for one stream; tokens of `skip_ids` leave no text."""
    if tokenizer.is_byte_level:
        return ByteDetokenizer(tokenizer, skip_ids)
    return PrefixDetokenizer(tokenizer, skip_ids)


class ByteDetokenizer:
    """For byte-level BPE, where a token is a fixed string of bytes: a look into a table.

    The pieces together equal the tokenizer's decode of all ids, for any ids.
    """

    __slots__ = ("_decoder", "_pending", "_skip_ids", "_texts", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_ids: frozenset[int] = frozenset()) -> None:
        self._texts = tokenizer.whole_texts
        self._tokenizer = tokenizer
        self._skip_ids = skip_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = False

    def push(self, token_id: int) -> str:
        if token_id in self._skip_ids:
            return ""
        if not self._pending and 0 <= token_id < len(self._texts):
            text = self._texts[token_id]
            if text is not None:
                return text
        text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
        self._pending = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        self._pending = False
        return self._decoder.decode(b"", final=True)


class PrefixDetokenizer:
    """For every other tokenizer: decodes a short window with and without the new token.

    The window starts one piece early, because such decoders treat the first token of a text
    unlike the others (a leading space goes). Decoders with byte fallback spoil a whole run of
    bytes when one of it is invalid; a stream cannot take text back, so there the characters
    before the invalid byte stay.
    """

    __slots__ = ("_before", "_held", "_ids", "_skip_ids", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_ids: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._skip_ids = skip_ids
        self._ids: list[int] = []  # context, whose text is out, then held tokens
        self._held = 0
        self._before = ""  # text of the context alone

    def push(self, token_id: int) -> str:
        if token_id in self._skip_ids or not self._tokenizer.token_bytes(token_id):
            return ""
        self._ids.append(token_id)
        self._held += 1
        text = self._text_of_held(self._held)
        if text and not text.endswith("\ufffd"):
            self._release(self._held, text)
            return text
        if self._held < _MAX_CHARACTER_TOKENS:
            return ""
        text = self._text_of_held(1)  # no character can still need the oldest token
        self._release(1, text)
        return text

    def finish(self) -> str:
        text = self._text_of_held(self._held)
        self._release(self._held, text)
        return text

    def _text_of_held(self, count: int) -> str:
        end = len(self._ids) - self._held + count
        return self._tokenizer.decode(self._ids[:end])[len(self._before) :]

    def _release(self, count: int, text: str) -> None:
        """The oldest held tokens become the context, beside the old one if they have no text."""
        context = len(self._ids) - self._held
        self._held -= count
        del self._ids[: context if text else max(0, context + count - _MAX_CONTEXT_TOKENS)]
        self._before = self._tokenizer.decode(self._ids[: len(self._ids) - self._held])
