"""What is wrong with a grammar, for whoever sent it."""

from __future__ import annotations

import re

MAX_CHARS = 300
_PLACE = re.compile(r"^(?:at )?[0-9]+\([0-9]+\): |\(at [^)]*\) ?")
_WORDS = (
    ("Enable 'coerce_one_of' option to approximate oneOf with anyOf", "Use anyOf"),
    ("Unimplemented keys:", "these keywords cannot be enforced, so leave them out:"),
    ("Unknown format:", "this format is not known, so leave it out or use a pattern:"),
)
_NOISE = re.compile(
    r"^(?:failed to compile JSON schema|failed to parse \"%json\"): ?", re.IGNORECASE
)


class GrammarError(ValueError):
    """A grammar that cannot be held to; the message says what is wrong with it, or what it met."""


def told(complaint: str) -> str:
    """llguidance's complaint without the state that it dumps, and without places in grammars that
    the client never saw."""
    first, _, _ = complaint.partition("\n<")
    lines = [
        line.strip() for line in first.splitlines() if not re.match(r"\s*(?:[0-9]+ \||\^)", line)
    ]
    text = _NOISE.sub("", _PLACE.sub("", " ".join(filter(None, lines))))
    for theirs, ours in _WORDS:
        text = text.replace(theirs, ours)
    return (text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + " ...") or "it does not compile"
