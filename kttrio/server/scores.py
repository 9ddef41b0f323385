"""The scores of an answer's tokens, as several protocols tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kttrio.request import TokenLogprob
from kttrio.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def token_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Each token and the likeliest ones in its place, in the words of OpenAI."""
    return [
        {
            **_token_fields(tokenizer, score.token, score.logprob),
            "top_logprobs": [_token_fields(tokenizer, *pair) for pair in score.top],
        }
        for score in scores
    ]


def _token_fields(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = list(tokenizer.token_bytes(token))
    return {"token": tokenizer.piece(token), "logprob": finite(logprob), "bytes": raw}
