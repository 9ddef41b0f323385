"""Names that the server gives: of requests, answers and what is in them."""

from __future__ import annotations

import secrets


def new_id(prefix: str) -> str:
    """A name that nobody can guess. `prefix` has the mark that clients expect behind it."""
    return prefix + secrets.token_hex(16)
