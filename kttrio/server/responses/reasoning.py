"""Reasoning that clients carry from turn to turn, as they would OpenAI's `encrypted_content`.

The server keeps no response, and some clients send back this field alone. It is no secret: the
text itself, in letters that no client tries to read.
"""

from __future__ import annotations

import base64

_MARK = "kttrio1."


def carry(text: str) -> str:
    """The reasoning as an opaque string."""
    return _MARK + base64.urlsafe_b64encode(text.encode(errors="replace")).decode()


def carried(value: str) -> str | None:
    """The reasoning in a string of `carry`; None where another server wrote it."""
    mark, content = value[: len(_MARK)], value[len(_MARK) :]
    if mark != _MARK:
        return None
    try:
        return base64.b64decode(content, altchars=b"-_", validate=True).decode()
    except ValueError:
        return None
