"""What pages of other sites may do with this server (CORS): nothing, unless the flags name them.

Browsers ask before they send what a plain form could not, and hide every answer that does not
allow its reading; whoever is no browser is not concerned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from kttrio.config import ConfigError

Headers = list[tuple[bytes, bytes]]

ANY = "*"
ORIGIN = re.compile(r"https?://[^/?#\s]+")
EXPOSED = b"x-request-id, retry-after, inference-header-content-length"
METHODS = b"GET, POST, OPTIONS"
DEFAULT_HEADERS = b"authorization, content-type, x-api-key, x-request-id"
FIELD_NAMES = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z, -]{1,2048}")
CACHE_SECONDS = 600


def check_origins(origins: Sequence[str]) -> None:
    """Raises ConfigError for what is no origin."""
    for origin in origins:
        if origin != ANY and not ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--allowed-origins: {origin!r} is no origin; write https://HOST, with its port "
                "but without a path, or * for all"
            )


class Cors:
    """The origins that are let in."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._any = ANY in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def headers(self, request: Mapping[bytes, bytes]) -> Headers:
        """Header fields of the answer to a request with these ones, an error included."""
        if not self._origins:
            return []
        vary = [] if self._any else [(b"vary", b"Origin")]
        if not self._admits(request):
            return vary
        origin = b"*" if self._any else request[b"origin"]
        allowed = (b"access-control-allow-origin", origin)
        return [allowed, (b"access-control-expose-headers", EXPOSED), *vary]

    def preflight(self, method: str, request: Mapping[bytes, bytes]) -> Headers | None:
        """Header fields that permit the request a browser asks about; None: it asks for nothing, or
        in vain."""
        asks = method == "OPTIONS" and b"access-control-request-method" in request
        if not asks or not self._admits(request):
            return None
        wanted = request.get(b"access-control-request-headers", DEFAULT_HEADERS)
        return [
            (b"access-control-allow-methods", METHODS),
            (
                b"access-control-allow-headers",
                wanted if FIELD_NAMES.fullmatch(wanted) else DEFAULT_HEADERS,
            ),
            (b"access-control-max-age", b"%d" % CACHE_SECONDS),
        ]

    def _admits(self, request: Mapping[bytes, bytes]) -> bool:
        origin = request.get(b"origin")
        return origin is not None and (self._any or origin in self._origins)
