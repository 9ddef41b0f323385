"""Answers written at random under a grammar: any token that may come does, sooner or later."""

from __future__ import annotations

from random import Random

from kttrio.text.matcher import Matcher
from kttrio.text.tokenizer import Tokenizer

MAX_TOKENS = 600


def allowed(mask: bytes | None) -> list[int]:
    assert mask is not None
    return [
        8 * place + bit for place, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1
    ]


def walk(
    matcher: Matcher, tokenizer: Tokenizer, seed: int, *, ways_out: tuple[str, ...] = ()
) -> str | None:
    """A whole output without its end token; None where it has not ended in time. `ways_out`: texts
    that bring it nearer to its end."""
    random, output = Random(seed), b""
    for _ in range(MAX_TOKENS):
        if ways_out and random.random() < 0.3:
            output += _spell(matcher, tokenizer, random.choice(ways_out))
        may_come = allowed(matcher.masks()[0])
        assert may_come, output
        ends = [token for token in may_come if token in tokenizer.eos_ids]
        if ends and (len(ends) == len(may_come) or random.random() < 0.5):
            matcher.advance(ends[:1])
            return output.decode(errors="replace")
        token = random.choice([token for token in may_come if token not in ends])
        matcher.advance([token])
        output += tokenizer.token_bytes(token)
    return None


def _spell(matcher: Matcher, tokenizer: Tokenizer, text: str) -> bytes:
    """What may come of the text."""
    written = b""
    for token in tokenizer.encode(text):
        if token not in allowed(matcher.masks()[0]):
            break
        matcher.advance([token])
        written += tokenizer.token_bytes(token)
    return written
