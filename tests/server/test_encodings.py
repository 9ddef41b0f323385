"""Packed bodies, the same for every protocol."""

from __future__ import annotations

import gzip
import zlib

import pytest

from kttrio.config import ServerConfig
from kttrio.server.encodings import encoding_of
from tests.http_front import MODEL, chat_body, encode, running_front

PATHS = {
    "/v1/chat/completions": chat_body(max_tokens=1),
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
    "/v1/messages": chat_body(max_tokens=1),
    f"/v2/models/{MODEL}/generate": {"text_input": "Hi", "max_tokens": 1},
    "/tokenize": {"prompt": "Hi"},
    "/abort_request": {"rid": "unknown"},
}
PATH = "/v1/completions"
BODY = encode(PATHS[PATH])


@pytest.mark.parametrize("path", PATHS)
async def test_every_protocol_reads_packed_bodies(path: str) -> None:
    async with running_front() as front:
        plain = await front.ask("POST", path, PATHS[path])
        assert plain.status == 200, plain.body
        for encoding, press in (("gzip", gzip.compress), ("Deflate", zlib.compress)):
            packed = press(encode(PATHS[path]))
            reply = await front.ask("POST", path, packed, Content_Encoding=encoding)
            assert reply.status == 200, reply.body
            assert reply.json().keys() == plain.json().keys()


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("", ""),
        ("br", ""),
        ("gzip;q=0", ""),
        ("gzip; q=0.000, deflate", "deflate"),
        ("br, DEFLATE;q=0.5, gzip", "deflate"),
        ("gzip, deflate, br", "gzip"),
        (",;,=", ""),
    ],
)
def test_the_encoding_of_an_answer(accepted: str, encoding: str) -> None:
    assert encoding_of(accepted) == encoding


async def test_a_compressed_body_is_bounded_by_what_comes_out() -> None:
    async with running_front(config=ServerConfig(max_body_bytes=4096)) as front:
        bomb = gzip.compress(b" " * 10_000_000)
        assert len(bomb) > 4096
        for body in (zlib.compress(b" " * 100_000), zlib.compress(b" " * 4097)):
            reply = await front.ask("POST", PATH, body, Content_Encoding="deflate")
            assert reply.status == 413
            assert "--max-body-bytes" in reply.error()["message"]
        fits = zlib.compress(BODY.ljust(4096))
        assert (await front.ask("POST", PATH, fits, Content_Encoding="deflate")).status == 200
        assert (await front.ask("POST", PATH, bomb, Content_Encoding="gzip")).status == 413


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("br", b"{}", 415),
        ("gzip, gzip", b"{}", 415),
        ("gzip", b"{}", 400),
        ("gzip", b"", 400),
        ("gzip", gzip.compress(BODY, mtime=0)[:-1], 400),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"more", 400),
        ("deflate", zlib.compress(b"{}")[2:], 400),
        ("identity", BODY, 200),
    ],
)
async def test_bad_encodings(encoding: str, body: bytes, status: int) -> None:
    async with running_front() as front:
        reply = await front.ask("POST", PATH, body, Content_Encoding=encoding)
        assert reply.status == status
        assert ("error" in reply.json()) is (status != 200)
