"""The signature of a thinking block: clients send it back with the block, unread.

It vouches for nothing. Where the answer does not show its reasoning it holds it, so that the
model finds it again in the history.
"""

from __future__ import annotations

import binascii

PREFIX = "kttrio:"
"""Begins every signature: some clients drop blocks that have an empty one."""


def seal(reasoning: str = "") -> str:
    """A signature that holds `reasoning`. Half characters become question marks."""
    return PREFIX + binascii.b2a_base64(reasoning.encode(errors="replace"), newline=False).decode()


def unseal(signature: str) -> str:
    """What a signature holds; nothing where another server made it."""
    if not signature.startswith(PREFIX):
        return ""
    try:
        return binascii.a2b_base64(signature.removeprefix(PREFIX), strict_mode=True).decode()
    except ValueError:
        return ""
