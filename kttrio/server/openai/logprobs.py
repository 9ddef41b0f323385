"""Log-probabilities as OpenAI's clients read them, of chats and of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kttrio.request import TokenLogprob
from kttrio.server.decoding import PromptLogprobs
from kttrio.server.scores import finite, token_logprobs
from kttrio.text.detokenizer import open_detokenizer
from kttrio.text.tokenizer import Tokenizer


def chat_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {"content": token_logprobs(tokenizer, scores), "refusal": None}


class TextLogprobs:
    """The log-probabilities of one text completion; offsets go on from call to call."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._first_id = prompt_ids[0]
        self._detokenizer = open_detokenizer(tokenizer)
        self._offset = 0

    def fields(
        self, prompt: PromptLogprobs | None, scores: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        """`prompt` comes with the first call or never. Its first token has no probability."""
        entries = [*(prompt or ()), *scores]
        ids = [self._first_id if entry is None else entry.token for entry in entries]
        return {
            "tokens": [self._tokenizer.piece(token) for token in ids],
            "token_logprobs": [entry and finite(entry.logprob) for entry in entries],
            "top_logprobs": [entry and self._top(entry) for entry in entries],
            "text_offset": [self._offset_of(token) for token in ids],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The best tokens and, as clients expect, the chosen one among them."""
        pairs = [*entry.top, (entry.token, entry.logprob)]
        return {self._tokenizer.piece(token): finite(logprob) for token, logprob in pairs}

    def _offset_of(self, token: int) -> int:
        """Characters before the token; one that completes a character begins with it."""
        offset = self._offset
        self._offset += len(self._detokenizer.push(token))
        return offset
