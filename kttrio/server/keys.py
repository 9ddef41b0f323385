"""Who may do what: the keys that requests carry, against those of the flags. Knows no routes.

As with SGLang, `--api-key` guards everything and `--admin-api-key` what concerns the whole server
or other people's requests; where only one of them is given it guards its own part alone, but for
the routes of operators, which then take any API key.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256
from ipaddress import ip_address

from kttrio.config import ServerConfig
from kttrio.server.errors import ApiError


class Keys:
    """The keys of one server, as digests: all have the same length, and none can be shown."""

    def __init__(self, config: ServerConfig) -> None:
        admins = () if config.admin_api_key is None else (config.admin_api_key,)
        self._admins = [_digest(key.encode(errors="surrogateescape")) for key in admins]
        self._users = [_digest(key.encode(errors="surrogateescape")) for key in config.api_key]

    def check(self, given: bytes, *, admin: bool) -> None:
        """Refuse whoever does not have the key: 401, or 403 where another key is needed. `admin`:
        for a route of operators. Takes as long whatever is given."""
        digest = _digest(given)
        is_admin, is_user = _among(digest, self._admins), _among(digest, self._users)
        needed = self._admins if admin and self._admins else self._users
        if not needed or is_admin or (is_user and needed is self._users):
            return
        if is_user:
            message = "This needs the server's admin key (--admin-api-key)."
            raise ApiError(403, message, code="admin_key_required")
        message = (
            "Wrong or missing API key: send it as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'."
        )
        raise ApiError(401, message, code="invalid_api_key")


def presented(authorization: str, x_api_key: str) -> bytes:
    """The key in these two header fields, read as latin-1; empty where there is none."""
    scheme, _, token = authorization.partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else x_api_key
    return given.encode("latin-1", "replace")  # every byte comes back


def exposure(config: ServerConfig) -> str | None:
    """What the operator should know who lets everybody in; None where all is well."""
    if config.api_key or _is_loopback(config.host):
        return None
    control = "" if config.admin_api_key else " and end the requests of others"
    return (
        f"--host {config.host} without --api-key: whoever reaches this port can use the model"
        f"{control}; set --api-key, or KTTRIO_API_KEY"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()


def _among(digest: bytes, known: Sequence[bytes]) -> bool:
    """Whether it is one of them; all are looked at."""
    return sum(hmac.compare_digest(digest, one) for one in known) > 0
