"""The complaint about a grammar."""

from __future__ import annotations


class GrammarError(ValueError):
    """A grammar that cannot be held to; the message says what is wrong with it, or what it met."""
