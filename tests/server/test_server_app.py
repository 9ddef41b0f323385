"""Who may call, unknown paths and methods, failures of our own."""

from __future__ import annotations

import pytest

from kttrio.config import ServerConfig
from tests.http_front import ANSWER, running_front

KEY = "s3cret-schlüssel"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer  {KEY}"},
        {"X_Api_Key": KEY},
    ],
)
async def test_the_key_opens(headers: dict[str, str]) -> None:
    async with running_front(config=ServerConfig(api_key=(KEY,))) as front:
        assert (await front.ask("GET", "/v1/models", **headers)).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic s3cret"},
        {"Authorization": "Bearer s3cret-schl"},
        {"X_Api_Key": ""},
        {"X_Api_Key": "\xff\xfe"},
    ],
)
async def test_without_the_key_all_but_health_is_closed(headers: dict[str, str]) -> None:
    async with running_front(config=ServerConfig(api_key=(KEY,))) as front:
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/get_server_info"),
            ("GET", "/health_generate"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/nowhere"),
        ):
            reply = await front.ask(method, path, **headers)
            assert reply.status == 401
            assert reply.error()["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        assert (await front.ask("GET", "/health", **headers)).status == 200


async def test_unknown_paths_and_methods_have_the_error_shape() -> None:
    async with running_front() as front:
        reply = await front.ask("GET", "/v9/nothing")
        assert (reply.status, reply.error()["type"]) == (404, "invalid_request_error")
        reply = await front.ask("GET", "/v1/chat/completions")
        assert reply.status == 405
        assert "POST" in reply.headers["allow"]
        assert reply.error()["message"]
        assert (await front.ask("HEAD", "/health")).status == 200


@pytest.mark.parametrize("path", ["/v1//models", "/v1/models/", "/v2//health/live"])
async def test_paths_that_are_nearly_there_are_not_redirected(path: str) -> None:
    async with running_front() as front:
        reply = await front.ask("GET", path)
        assert (reply.status, reply.headers["content-type"]) == (404, "application/json")
        assert f"There is no {path} here" in reply.body.decode()


async def test_our_own_failure_is_a_500_that_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_front() as front:
        with monkeypatch.context() as broken:
            broken.setattr("kttrio.server.openai.routes.prepare_chat", None)
            reply = await front.chat()
        assert reply.status == 500
        assert reply.error()["type"] == "server_error"
        assert "NoneType" not in reply.error()["message"]
        assert f"(request {reply.headers['x-request-id']}) failed" in caplog.text
        assert (await front.chat()).json()["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_cannot_be_written_fails_alone(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_front() as front:
        with monkeypatch.context() as broken:
            broken.setattr("kttrio.text.output.OutputPipeline.push", None)
            reply = await front.chat(stream=stream)
        error = reply.events()[-1]["error"] if stream else reply.error()
        assert error["type"] == "server_error"
        assert "could not be made" in caplog.text
        await front.idle()
        assert front.state.engine.stats.healthy
        assert (await front.chat()).status == 200


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/audio/speech", "/api/chat", "/rerank"])
async def test_paths_of_other_servers_say_why_they_are_not_here(path: str) -> None:
    async with running_front() as front:
        reply = await front.ask("POST", path, {})
        assert reply.status == 404
        assert reply.error()["message"].startswith(f"There is no {path} here: this server ")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/chat/completions", "here: you want /v1/chat/completions; check the client's base URL."),
        ("/v1/v1/messages", "here: you want /v1/messages; check"),
        ("/v1/chat/completions/", "here: you want /v1/chat/completions; check"),
        ("/v1/health", "here: you want /health; check"),
        ("/", "here; /openapi.json lists what there is."),
    ],
)
async def test_a_slip_of_the_base_url_is_put_right(path: str, told: str) -> None:
    async with running_front() as front:
        reply = await front.ask("GET", path)
        assert reply.status == 404
        assert told in reply.error()["message"]
