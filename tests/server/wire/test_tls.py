"""TLS on both ports: what the clients know of it, and that nothing else changes."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from kttrio.config import ConfigError, ServerConfig
from kttrio.server.wire.tls import Seal, server_context
from tests.http2_client import INFERENCE, Http2Client, infer_request
from tests.http_front import ANSWER, Client, Front, chat_body, raw_request, running_front

KEYS = Path(__file__).parents[2] / "fixtures" / "tls"
SERVER = {"ssl_certfile": KEYS / "server.pem", "ssl_keyfile": KEYS / "server.key"}
STREAM = chat_body(stream=True)


def tls_config(**settings: Any) -> ServerConfig:
    return ServerConfig(grpc_port=0, **{**SERVER, **settings})


def client_context(*, shows: str | None = None) -> ssl.SSLContext:
    """A client that trusts the server's certificate, and shows one of its own if it `shows` one."""
    context = ssl.create_default_context(cafile=str(KEYS / "server.pem"))
    if shows is not None:
        context.load_cert_chain(KEYS / f"{shows}.pem", KEYS / f"{shows}.key")
    return context


@asynccontextmanager
async def sealed_client(
    front: Front, *, grpc: bool = False, shows: str | None = None, receive_buffer: int | None = None
) -> AsyncIterator[trio.SSLStream[trio.SocketStream]]:
    """A client after its greeting."""
    address = (front.grpc or "") if grpc else front.url
    port = int(address.rsplit(":", 1)[1])
    clear = await front.connect(port=port, receive_buffer=receive_buffer)
    context = client_context(shows=shows)
    context.set_alpn_protocols(["h2", "http/1.1"])
    stream = trio.SSLStream(
        clear.stream, context, server_hostname="localhost", https_compatible=True
    )
    async with clear.stream:
        await stream.do_handshake()
        yield stream


async def test_a_stream_and_a_whole_answer_over_tls() -> None:
    async with running_front(config=tls_config()) as front, sealed_client(front) as stream:
        assert front.url.startswith("https://")
        assert stream.selected_alpn_protocol() == "http/1.1"
        client = Client(stream)
        for _ in range(2):
            reply = await client.ask("POST", "/v1/chat/completions", STREAM)
            assert reply.events()[-1] == "[DONE]"
            whole = await client.ask("POST", "/v1/chat/completions", chat_body())
            assert whole.json()["choices"][0]["message"]["content"] == ANSWER


async def test_an_answer_without_length_ends_with_tlss_own_end() -> None:
    async with running_front(config=tls_config()) as front, sealed_client(front) as stream:
        await stream.send_all(raw_request(STREAM, version="1.0"))
        received = b""
        while data := await stream.receive_some(65536):  # an end without notice would raise
            received += data
        assert received.endswith(b"data: [DONE]\n\n")


async def test_grpc_over_tls_is_chosen_by_alpn() -> None:
    async with (
        running_front(config=tls_config()) as front,
        sealed_client(front, grpc=True) as stream,
    ):
        assert stream.selected_alpn_protocol() == "h2"
        client = Http2Client(stream)
        await client.flush()
        request = infer_request("word " * 20_000, max_tokens=1).SerializeToString()
        answer = await client.call(f"{INFERENCE}/ModelInfer", request)
        assert answer.status == 3
        assert "tokens" in answer.complaint
        answer = await client.infer(max_tokens=30)
        assert ANSWER.encode() in answer.body


async def test_tritons_client_comes_in_over_tls_with_a_key() -> None:
    config = tls_config(api_key=("sesame",))
    async with running_front(config=config) as front:
        port = (front.grpc or "").rsplit(":", 1)[1]

        def ask() -> None:
            authority = str(KEYS / "server.pem")
            address = f"localhost:{port}"
            with InferenceServerClient(address, ssl=True, root_certificates=authority) as client:
                assert client.is_server_ready()
                with pytest.raises(InferenceServerException, match="API key"):
                    client.get_server_metadata()
                headers = {"authorization": "Bearer sesame"}
                assert client.get_server_metadata(headers=headers).name == "kttrio"

        await trio.to_thread.run_sync(ask)


async def test_a_client_that_reads_nothing_is_cut() -> None:
    config = tls_config(stream_write_timeout=0.2)
    async with (
        running_front(config=config, context_length=65536) as front,
        sealed_client(front, receive_buffer=2048) as stream,
    ):
        front.script.endless = True
        connection = await front.only_connection()
        connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await stream.send_all(raw_request(STREAM))
        await stream.receive_some(100)
        await front.idle()
        assert front.state.engine.stats.generated_tokens > 10


async def test_a_slow_reader_gets_every_byte_in_order() -> None:
    async with (
        running_front(config=tls_config(), context_length=8192) as front,
        sealed_client(front, receive_buffer=2048) as stream,
    ):
        front.script.endless = True
        client = Client(stream)
        body = chat_body(stream=True, max_tokens=1000)
        reply = await client.ask("POST", "/v1/chat/completions", body)
        text = "".join(
            chunk["choices"][0]["delta"].get("content", "") for chunk in reply.events()[:-1]
        )
        ids = front.tokenizer.encode(front.script.text)
        assert text == front.tokenizer.decode([ids[i % len(ids)] for i in range(1000)])


async def test_only_clients_with_a_certificate_are_let_in() -> None:
    config = tls_config(ssl_ca_certs=KEYS / "client.pem")
    async with running_front(config=config) as front:
        async with sealed_client(front, shows="client") as stream:
            assert (await Client(stream).ask("GET", "/health")).status == 200
        for shows in (None, "server"):
            with pytest.raises(trio.BrokenResourceError):
                async with sealed_client(front, shows=shows) as stream:
                    # In TLS 1.3 the client hears of it only now.
                    await Client(stream).ask("GET", "/health")


@pytest.mark.parametrize("wire", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\x16\x03\x01", b""])
async def test_a_greeting_that_is_none_ends_its_connection_only(
    wire: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_front(config=tls_config(header_timeout=1.0)) as front:
        clear = await front.connect()
        await clear.stream.send_all(wire)
        with trio.fail_after(5):
            while await receive(clear):
                pass
        async with sealed_client(front) as stream:
            assert (await Client(stream).ask("GET", "/health")).status == 200
    assert "Traceback" not in caplog.text


async def test_noise_after_the_greeting_ends_its_connection_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_front(config=tls_config()) as front:
        for grpc in (False, True):
            async with sealed_client(front, grpc=grpc) as stream:
                await stream.transport_stream.send_all(b"noise" * 100)
                with suppress(trio.BrokenResourceError), trio.fail_after(5):
                    while await stream.receive_some(65536):
                        pass
        async with sealed_client(front) as stream:
            assert (await Client(stream).ask("GET", "/health")).status == 200
    assert "ERROR" not in caplog.text


async def test_a_client_that_says_goodbye_cancels_its_request() -> None:
    async with running_front(config=tls_config(), context_length=65536, delay=0.001) as front:
        front.script.endless = True
        async with sealed_client(front) as stream:
            await stream.send_all(raw_request(STREAM))
            await stream.receive_some(100)
            with trio.move_on_after(0), suppress(trio.BrokenResourceError):
                await stream.aclose()
            await front.idle()


async def receive(client: Client) -> bytes:
    try:
        return bytes(await client.stream.receive_some(65536))
    except trio.BrokenResourceError:
        return b""


async def test_a_greeting_does_not_delay_the_end() -> None:
    async with running_front(config=tls_config()) as front:
        clear = await front.connect()
        await front.only_connection()
        front.shutdown.set()
        with trio.fail_after(1):
            assert await receive(clear) == b""
            await front.closed.wait()


def test_a_locked_key_needs_its_password() -> None:
    locked = {**SERVER, "ssl_keyfile": KEYS / "locked.key"}
    assert server_context(ServerConfig(**locked, ssl_keyfile_password="sesame"), ["h2"])
    for password in ("wrong", None):
        with pytest.raises(ConfigError, match="--ssl-keyfile-password") as caught:
            server_context(ServerConfig(**locked, ssl_keyfile_password=password), ["h2"])
        assert str(password) not in str(caught.value).replace("None", "")


def test_a_certificate_and_its_key_may_share_a_file(tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes((KEYS / "server.pem").read_bytes() + (KEYS / "server.key").read_bytes())
    assert server_context(ServerConfig(ssl_certfile=both), ["h2"])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ssl_certfile": KEYS / "missing.pem"}, "--ssl-certfile .*missing.pem"),
        ({**SERVER, "ssl_keyfile": KEYS / "client.key"}, "--ssl-keyfile .*client.key"),
        ({**SERVER, "ssl_ca_certs": KEYS / "missing.pem"}, "--ssl-ca-certs .*missing.pem"),
        ({"ssl_keyfile": KEYS / "server.key"}, "--ssl-keyfile.*--ssl-certfile"),
        ({"ssl_ca_certs": KEYS / "client.pem"}, "--ssl-ca-certs.*--ssl-certfile"),
    ],
)
def test_files_that_cannot_be_used_are_named(settings: dict[str, Path], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        server_context(ServerConfig(**settings), ["h2"])


def test_without_a_certificate_there_is_no_tls() -> None:
    assert server_context(ServerConfig(), ["http/1.1"]) is None


def test_a_seal_carries_any_number_of_bytes_both_ways() -> None:
    context = server_context(ServerConfig(**SERVER), ["http/1.1"])
    assert context is not None
    server = Seal(context)
    arrived, leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context().wrap_bio(arrived, leaving, server_hostname="localhost")
    greeted = False
    while not greeted:
        try:
            client.do_handshake()
            greeted = True
        except ssl.SSLWantReadError:
            server.shake_hands(leaving.read())
            arrived.write(server.pending())
    assert server.shake_hands(leaving.read())
    data = bytes(range(256)) * 1000
    arrived.write(server.pending() + server.close_in(data))
    assert b"".join(iter(lambda: read(client), b"")) == data
    client.write(data)
    sealed = leaving.read()
    assert server.take_out(sealed[:100]) + server.take_out(sealed[100:]) == data
    arrived.write(server.last_words())
    assert client.read() == b""


def read(client: ssl.SSLObject) -> bytes:
    try:
        return client.read(1 << 16)
    except ssl.SSLWantReadError:
        return b""
