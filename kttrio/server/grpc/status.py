"""How a call of gRPC ends: its status codes, and how they and their message are written."""

from __future__ import annotations

from enum import IntEnum
from urllib.parse import quote

from kttrio.server.errors import ApiError

MAX_MESSAGE = 1024
"""Characters of a status message: clients bound what they take of trailers."""


class Status(IntEnum):
    """The codes that this server gives, by gRPC's numbers."""

    OK = 0
    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


STATUSES = {
    400: Status.INVALID_ARGUMENT,
    401: Status.UNAUTHENTICATED,
    403: Status.PERMISSION_DENIED,
    404: Status.NOT_FOUND,
    413: Status.RESOURCE_EXHAUSTED,
    429: Status.RESOURCE_EXHAUSTED,
    501: Status.UNIMPLEMENTED,
    503: Status.UNAVAILABLE,
    504: Status.DEADLINE_EXCEEDED,
}


class RpcError(Exception):
    """A call that fails with this status."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def rpc_error(error: ApiError) -> RpcError:
    """What HTTP says with a status, said with one of gRPC's."""
    default = Status.INVALID_ARGUMENT if error.status < 500 else Status.INTERNAL
    return RpcError(STATUSES.get(error.status, default), error.message)


def status_fields(status: Status, message: str = "") -> list[tuple[bytes, bytes]]:
    """The header fields that end a call."""
    fields = [(b"grpc-status", b"%d" % status)]
    if message:
        text = message[:MAX_MESSAGE].encode(errors="replace")
        printable = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
        fields.append((b"grpc-message", quote(text, safe=printable).encode()))
    return fields
