"""Pages of other sites: kept out, unless the flags let them in."""

from __future__ import annotations

import pytest

from kttrio.config import ConfigError, ServerConfig
from kttrio.server.cors import check_origins
from tests.http_front import running_front

HOME = "https://chat.example"
ALLOW = "access-control-allow-origin"
ASKS = {"Access_Control_Request_Method": "POST"}


async def test_nobody_is_let_in_unless_asked() -> None:
    async with running_front() as front:
        reply = await front.ask("GET", "/v1/models", Origin=HOME)
        assert reply.status == 200
        assert ALLOW not in reply.headers
        reply = await front.ask("OPTIONS", "/v1/chat/completions", Origin=HOME, **ASKS)
        assert not [name for name in reply.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("allowed", "told"), [((HOME,), HOME), (("*",), "*"), ((HOME, "*"), "*")])
async def test_the_named_origins_may_read_answers_errors_and_streams(
    allowed: tuple[str, ...], told: str
) -> None:
    config = ServerConfig(allowed_origins=allowed, api_key=("k",))
    async with running_front(config=config) as front:
        headers = {"Origin": HOME, "X_Api_Key": "k"}
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        for reply, status in (
            (await front.ask("GET", "/v1/models", **headers), 200),
            (await front.ask("GET", "/v1/models", Origin=HOME), 401),
            (await front.ask("GET", "/nowhere", **headers), 404),
            (await front.ask("POST", "/v1/chat/completions", b"{", **headers), 400),
            (
                await front.ask(
                    "POST", "/v1/chat/completions", {**body, "stream": True}, **headers
                ),
                200,
            ),
        ):
            assert (reply.status, reply.headers[ALLOW]) == (status, told)
            assert "x-request-id" in reply.headers["access-control-expose-headers"]
            assert ("vary" in reply.headers) is (told != "*")


async def test_a_preflight_is_answered_without_a_key() -> None:
    config = ServerConfig(allowed_origins=(HOME,), api_key=("k",))
    async with running_front(config=config) as front:
        path, wanted = "/v1/chat/completions", "authorization, x-stainless-os"
        asks = {**ASKS, "Access_Control_Request_Headers": wanted}
        reply = await front.ask("OPTIONS", path, Origin=HOME, **asks)
        assert (reply.status, reply.body) == (204, b"")
        assert reply.headers[ALLOW] == HOME
        assert "POST" in reply.headers["access-control-allow-methods"]
        assert reply.headers["access-control-allow-headers"] == wanted
        stranger = await front.ask("OPTIONS", path, Origin="https://evil.example", **asks)
        assert ALLOW not in stranger.headers
        assert stranger.headers["vary"] == "Origin"


async def test_strange_names_of_header_fields_are_not_echoed() -> None:
    config = ServerConfig(allowed_origins=("*",))
    async with running_front(config=config) as front:
        for names in ("a(b)", "x" * 3000):
            asks = {**ASKS, "Access_Control_Request_Headers": names}
            reply = await front.ask("OPTIONS", "/v1/models", Origin=HOME, **asks)
            assert reply.headers["access-control-allow-headers"].startswith("authorization")


@pytest.mark.parametrize(
    "origin", ["chat.example", "https://chat.example/", "https://", "null", "**"]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-origins"):
        check_origins([HOME, origin])
