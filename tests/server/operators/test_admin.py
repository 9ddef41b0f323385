"""Health, and what the server tells about itself."""

from __future__ import annotations

import pytest
import trio

from kttrio.config import EngineConfig
from kttrio.server.operators import admin
from tests.http_front import MODEL, chat_body, running_front


async def test_health() -> None:
    async with running_front() as front:
        reply = await front.ask("GET", "/health")
        assert (reply.status, reply.json()) == (200, {"status": "ok"})


async def test_health_tells_of_failed_steps_until_the_next_good_one() -> None:
    async with running_front(fail_steps=(0,)) as front:
        assert (await front.chat()).status == 500
        reply = await front.ask("GET", "/health")
        assert reply.status == 503
        assert "scripted failure" in reply.json()["reason"]
        assert (await front.chat()).status == 200
        assert (await front.ask("GET", "/health")).status == 200


async def test_health_forgives_an_idle_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A balancer sends nothing to an unhealthy server, so that no step could prove it well."""
    async with running_front(fail_steps=(0, 1)) as front:
        assert (await front.chat()).status == 500
        assert (await front.ask("GET", "/health")).status == 503
        monkeypatch.setattr("kttrio.engine.engine.DOUBT_SECONDS", 0.0)
        assert (await front.ask("GET", "/ping")).json() == {"status": "ok"}
        monkeypatch.setattr("kttrio.engine.engine.DOUBT_SECONDS", 60.0)
        assert (await front.chat()).status == 500
        assert (await front.ask("GET", "/health")).status == 503


async def test_health_does_not_forgive_what_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kttrio.engine.engine.DOUBT_SECONDS", 0.0)
    async with running_front(fail_steps=(0,), delay=0.05) as front:
        assert (await front.chat()).status == 500
        client = await front.connect()
        await client.send("POST", "/v1/chat/completions", chat_body())
        while not front.state.engine.stats.running:
            await trio.lowlevel.checkpoint()
        assert (await front.ask("GET", "/health")).status == 503
        assert (await client.receive()).status == 200
        assert (await front.ask("GET", "/health")).status == 200


async def test_health_generate_draws_a_token() -> None:
    async with running_front(fail_steps=(1,)) as front:
        assert (await front.ask("GET", "/health_generate")).status == 200
        assert front.runner.num_steps == 1
        reply = await front.ask("GET", "/health_generate")
        assert reply.status == 503
        assert reply.error()["code"] == "engine_error"


async def test_health_generate_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "GENERATE_SECONDS", 0.01)
    async with running_front(delay=0.2) as front:
        reply = await front.ask("GET", "/health_generate")
        assert reply.status == 503
        assert reply.error()["code"] == "engine_timeout"
        await front.idle()


async def test_a_full_server_that_draws_tokens_is_well() -> None:
    limits = EngineConfig(max_queued_requests=1)
    async with running_front(engine_config=limits, num_slots=1, delay=0.002) as front:
        front.script.endless = True
        for _ in range(2):
            client = await front.connect()
            await client.send("POST", "/v1/chat/completions", chat_body(stream=True))
        while not front.state.engine.stats.waiting:
            await trio.lowlevel.checkpoint()
        assert (await front.chat()).status == 429
        assert (await front.ask("GET", "/health_generate")).status == 200
        front.state.draining = True
        assert (await front.ask("GET", "/health_generate")).status == 503


async def test_server_info() -> None:
    async with running_front() as front:
        front.state.settings = {"isa": "avx2", "experts": {"threads": 2}}
        info = (await front.ask("GET", "/get_server_info")).json()
        assert info["isa"] == "avx2"
        assert info["model"] == MODEL
        assert info["engine"]["free_slots"] == 8
        assert info["engine"]["draft_tokens"] == info["engine"]["accepted_draft_tokens"] == 0
        assert info["live_requests"] == 0
        model = (await front.ask("GET", "/get_model_info")).json()
        assert model["model_path"] == MODEL
