"""Status codes and messages."""

from __future__ import annotations

from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.server.errors import ApiError
from kttrio.server.grpc.status import MAX_MESSAGE, Status, rpc_error, status_fields


@pytest.mark.parametrize(
    ("http", "grpc"),
    [
        (400, Status.INVALID_ARGUMENT),
        (401, Status.UNAUTHENTICATED),
        (404, Status.NOT_FOUND),
        (418, Status.INVALID_ARGUMENT),
        (429, Status.RESOURCE_EXHAUSTED),
        (500, Status.INTERNAL),
        (503, Status.UNAVAILABLE),
    ],
)
def test_every_http_status_has_one_of_grpcs(http: int, grpc: Status) -> None:
    error = rpc_error(ApiError(http, "Why."))
    assert (error.status, error.message) == (grpc, "Why.")


@given(st.text(max_size=200))
def test_messages_are_printable_and_come_back(message: str) -> None:
    fields = dict(status_fields(Status.INTERNAL, message))
    assert fields[b"grpc-status"] == b"13"
    written = fields.get(b"grpc-message", b"").decode("ascii")
    assert all(0x20 <= ord(letter) <= 0x7E for letter in written)
    assert unquote(written) == message.encode(errors="replace").decode()


def test_a_long_message_is_cut() -> None:
    fields = dict(status_fields(Status.INTERNAL, "a" * 100_000))
    assert len(fields[b"grpc-message"]) == MAX_MESSAGE


def test_success_needs_no_words() -> None:
    assert status_fields(Status.OK) == [(b"grpc-status", b"0")]
