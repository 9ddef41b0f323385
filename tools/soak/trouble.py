"""Clients that no server deserves: each does one bad thing, and says what came of it.

A word that begins with "!" is a finding: the server did what it must not.
"""

from __future__ import annotations

import gzip
import json
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import trio

from kttrio.client import Client, ClientError, StatusError

CHAT = "/v1/chat/completions"
USER: tuple[dict[str, Any], ...] = ({"role": "user", "content": "Hi"},)
PATIENCE = 60.0
FLOOD = 20
SMALL_BUFFER = 4096
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Victim:
    """The server."""

    url: str
    port: int
    grpc_port: int
    model: str


Trouble = Callable[[Victim, random.Random], Awaitable[str]]


@asynccontextmanager
async def _socket(port: int, *, small: bool = False) -> AsyncIterator[trio.SocketStream]:
    """A connection. `small`: one that soon takes no more."""
    sock = trio.socket.socket()
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    try:
        await sock.connect(("127.0.0.1", port))
    except BaseException:
        sock.close()
        raise
    async with trio.SocketStream(sock) as stream:
        yield stream


def _post(path: str, body: bytes, *head: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: soak", f"Content-Length: {len(body)}", *head)
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _chat(**fields: Any) -> bytes:
    return json.dumps({"messages": USER, "max_tokens": 8, **fields}).encode()


async def _read_end(stream: trio.SocketStream) -> bytes | None:
    """All that comes until the server closes; None where it does not."""
    found = bytearray()
    with trio.move_on_after(PATIENCE) as waiting, suppress(trio.BrokenResourceError, OSError):
        async for part in stream:
            found += part
    return None if waiting.cancelled_caught else bytes(found)


# Bad requests


def _schema(told: Any) -> dict[str, Any]:
    named = {"name": "bomb", "schema": told}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _deep(depth: int) -> dict[str, Any]:
    told: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        told = {"type": "object", "properties": {"a": told}, "required": ["a"]}
    return told


def _doubling(depth: int) -> dict[str, Any]:
    """Each definition has two of the next: a few lines that would unfold to 2 ** depth."""
    definitions: dict[str, Any] = {f"d{depth}": {"type": "integer"}}
    for number in range(depth):
        next_one = {"$ref": f"#/$defs/d{number + 1}"}
        definitions[f"d{number}"] = {"type": "object", "properties": {"a": next_one, "b": next_one}}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


BAD_FIELDS: tuple[dict[str, Any], ...] = (
    {"messages": []},
    {"messages": "Hi"},
    {"temperature": "hot"},
    {"top_p": 7},
    {"max_tokens": -1},
    {"max_tokens": 10**30},
    {"model": "another"},
    {"stop": [""]},
    {"logit_bias": {"99999999": 1}},
    {"n": 10_000},
    {"tools": [{"type": "function"}]},
    {"tool_choice": "required"},
    {"regex": "("},
    {"regex": "(((a{1,1000}){1,1000}){1,1000}){1,1000}"},
    {"ebnf": "root ::= missing"},
    {"guided_grammar": "start: " + "(" * 5000},
    _schema({"not": {}}),
    _schema({"$ref": "https://example.com/schema.json"}),
    _schema(
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    ),
    _schema(_deep(300)),
    _schema(_doubling(200)),
    _schema({"enum": [f"{'x' * 50}{number}" for number in range(60_000)]}),
    {"messages": [{"role": "user", "content": "word " * 60_000}]},
    {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}],
            }
        ]
    },
)
"""Each refused, or so costly that it is answered or refused within its bounds."""
BAD_BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"messages": NaN}',
    b"\xff\xfe{}",
    b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"max_tokens": ' + b"9" * 5000 + b"}",
)
PATHS = (CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/nowhere")


async def flood(victim: Victim, dice: random.Random) -> str:
    """Bad requests, one after the other on a kept connection."""
    async with Client(victim.url, timeout=PATIENCE) as client:
        for _ in range(FLOOD):
            fields = {"messages": USER, "max_tokens": 4, **dice.choice(BAD_FIELDS)}
            with suppress(StatusError):
                await client.post_json(CHAT, fields)
    return "flood of bad requests"


async def bad_bodies(victim: Victim, dice: random.Random) -> str:
    """Bodies that are no JSON, or more than that. All that may come of them is a 4xx."""
    for body in dice.sample(BAD_BODIES, 4):
        path = dice.choice(PATHS)
        async with _socket(victim.port) as stream:
            await stream.send_all(_post(path, body, "Connection: close"))
            answer = await _read_end(stream)
        if answer is None or not answer.startswith(b"HTTP/1.1 4"):
            return f"!{path} {body[:40]!r} was answered {(answer or b'')[:60]!r}"
    return "bad bodies"


async def gzip_bomb(victim: Victim, dice: random.Random) -> str:
    """A gigabyte of zeros in a megabyte."""
    body = gzip.compress(bytes(1 << 20), mtime=0) * 1024
    async with _socket(victim.port) as stream:
        path = f"/v2/models/{victim.model}/infer"
        sent = _post(path, body, "Content-Encoding: gzip", "Connection: close")
        with suppress(trio.BrokenResourceError):
            await stream.send_all(sent)
        answer = await _read_end(stream) or b""
    return "gzip bomb" if answer.startswith(b"HTTP/1.1 4") else f"!gzip bomb: {answer[:60]!r}"


async def huge_head(victim: Victim, dice: random.Random) -> str:
    """More header fields than fit anywhere."""
    many = [f"X-{number}: {'y' * 100}" for number in range(dice.choice([1, 20, 5000]))]
    many.append("X-Long: " + "z" * dice.choice([10, 200_000]))
    async with _socket(victim.port) as stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(_post(CHAT, b"{}", "Connection: close", *many))
        answer = await _read_end(stream)
    return "!a huge head holds a connection" if answer is None else "huge head"


async def garbage(victim: Victim, dice: random.Random) -> str:
    """Bytes that mean nothing, on either port, maybe after a proper beginning."""
    port = dice.choice([victim.port, victim.grpc_port])
    begin = dice.choice([b"", PREFACE, b"GET / HTTP/1.1\r\n", b"\x16\x03\x01"])
    async with _socket(port) as stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(begin + dice.randbytes(dice.randrange(1, 20_000)))
            await stream.send_eof()
        answer = await _read_end(stream)
    return "!garbage holds a connection" if answer is None else "garbage"


async def long_prompts(victim: Victim, dice: random.Random) -> str:
    """As much text as a body may hold, of which no model would take a tenth."""
    async with Client(victim.url, timeout=PATIENCE) as client:
        try:
            text = dice.choice(["word ", "a", "東", "\n"]) * dice.choice([100_000, 400_000])
            await client.post_json("/tokenize", {"prompt": text})
            await client.post_json("/v1/completions", {"prompt": text, "max_tokens": 1})
        except StatusError as error:
            return "long prompt" if error.status in (400, 413, 429) else f"!long prompt: {error}"
    return "!a prompt beyond all limits is taken"


async def crowd(victim: Victim, dice: random.Random) -> str:
    """Many connections at once that want nothing."""
    async with AsyncExitStack() as stack:
        for _ in range(100):
            port = dice.choice([victim.port, victim.grpc_port])
            await stack.enter_async_context(_socket(port))
        await trio.sleep(dice.random())
    return "crowd"


# Slow and leaving clients


async def loris(victim: Victim, dice: random.Random) -> str:
    """A request that never becomes whole, a byte now and then."""
    whole = _post(CHAT, _chat(max_tokens=4) + b" " * 4000)
    begun, port = dice.choice([(0, victim.port), (len(whole) - 3900, victim.port), (0, 0)])
    async with _socket(port or victim.grpc_port) as stream, trio.open_nursery() as nursery:
        nursery.start_soon(_drip, stream, whole[:begun], whole[begun:])
        answer = await _read_end(stream)
        nursery.cancel_scope.cancel()
    return "!a slow request is never closed" if answer is None else "slow request"


async def _drip(stream: trio.SocketStream, begun: bytes, rest: bytes) -> None:
    with suppress(trio.BrokenResourceError, OSError):
        await stream.send_all(begun)
        for byte in rest:
            await stream.send_all(bytes([byte]))
            await trio.sleep(0.5)


async def deaf(victim: Victim, dice: random.Random) -> str:
    """Asks for much, and reads nothing until long after."""
    much = _chat(stream=True, n=4, max_tokens=600, ignore_eos=True, logprobs=True, top_logprobs=20)
    async with _socket(victim.port, small=True) as stream:
        await stream.send_all(_post(CHAT, much))
        await trio.sleep(dice.uniform(20, 40))
        answer = await _read_end(stream) or b""
    return "deaf reader, served" if b"[DONE]" in answer else "deaf reader, cut"


async def leave(victim: Victim, dice: random.Random) -> str:
    """Asks and is gone, at any moment."""
    path = dice.choice(PATHS[:4])
    fields = {"prompt": "Hi", "input": "Hi", "model": "claude-any", "stream": dice.random() < 0.5}
    body = _chat(**fields, **dice.choice([{}, {"regex": "[a-z]{5,400}"}]))
    request = _post(path, body)
    async with _socket(victim.port) as stream:
        await stream.send_all(request[: dice.choice([10, len(request) - 3, len(request)])])
        await trio.sleep(dice.random() ** 3)
        if dice.random() < 0.5:
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    return "client that left"


async def abort(victim: Victim, dice: random.Random) -> str:
    """An operator ends a stream."""
    name = f"soak-{dice.getrandbits(48):x}"
    body = json.loads(_chat(stream=True, max_tokens=400, ignore_eos=True, rid=name))
    async with Client(victim.url) as client, Client(victim.url) as operator:
        try:
            async with client.stream(CHAT, body) as events:
                await trio.sleep(dice.random())
                await operator.post_json("/abort_request", {"rid": name})
                while await events.chunk() is not None:
                    pass
        except StatusError as error:
            return "abort, too busy" if error.status == 429 else f"!abort: {error}"
        except ClientError as error:
            return f"!abort: {error}"
    return "abort"


TROUBLES: tuple[tuple[int, Trouble], ...] = (
    (8, flood),
    (8, bad_bodies),
    (1, gzip_bomb),
    (4, huge_head),
    (8, garbage),
    (4, loris),
    (3, deaf),
    (20, leave),
    (4, abort),
)
"""And how often each, beside the others."""
FLOODS: tuple[Trouble, ...] = (long_prompts, crowd)
"""What only a storm does: a soak would have no room left for those who behave."""
