"""Bodies that travel packed: `Content-Encoding` of requests, `Accept-Encoding` for answers."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from types import MappingProxyType

from kttrio.server.errors import ApiError, BadRequestError, body_too_large

WINDOWS: Mapping[str, int] = MappingProxyType({"gzip": 31, "deflate": 15})
"""The encodings of bodies, and what zlib calls their frames."""
UNWANTED = re.compile(r"q\s*=\s*0(\.0*)?")
"""How a client says that it does not take an encoding."""


def decoded(body: bytes, encoding: str, most_bytes: int) -> bytes:
    """The body that came in this `Content-Encoding`. Raises ApiError for one that is unknown, for
    bytes that are none of it, and where more than `most_bytes` come out."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in WINDOWS:
        message = f"The encoding '{encoding[:40]}' is not known here: send gzip or deflate."
        raise ApiError(415, message)
    stream = zlib.decompressobj(WINDOWS[name])
    try:
        data = stream.decompress(body, most_bytes + 1)
    except zlib.error as error:
        raise BadRequestError(f"The body is not valid {name}: {error}.") from None
    if len(data) > most_bytes:
        raise body_too_large(most_bytes)
    if not stream.eof or stream.unused_data:
        raise BadRequestError(
            f"The body is not valid {name}: it is cut, or goes on behind its end."
        )
    return data


def encoding_of(accepted: str) -> str:
    """The `Content-Encoding` of an answer to a client that accepts these; empty for none."""
    for entry in accepted.lower().split(","):
        name, _, quality = (part.strip() for part in entry.partition(";"))
        if name in WINDOWS and not UNWANTED.fullmatch(quality):
            return name
    return ""


def encoded(body: bytes, encoding: str) -> bytes:
    """The body in one of `WINDOWS`."""
    stream = zlib.compressobj(wbits=WINDOWS[encoding])
    return stream.compress(body) + stream.flush()
