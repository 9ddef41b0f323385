"""gRPC's health check."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from kttrio.config import ServerConfig
from kttrio.server.grpc import health as grpc_health
from kttrio.server.grpc.messages import MESSAGES
from tests.http2_client import Http2Client, http2_client
from tests.http_front import Front, running_front

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
SERVING, NOT_SERVING, UNKNOWN = 1, 2, 3


@pytest.fixture
async def front(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Front]:
    monkeypatch.setattr(grpc_health, "LOOK_SECONDS", 0.02)
    config = ServerConfig(grpc_port=0, api_key=("sesame",))
    async with running_front(config=config) as running:
        yield running


@pytest.fixture
async def client(front: Front) -> AsyncIterator[Http2Client]:
    async with http2_client(front) as connected:
        yield connected


def asked(service: str = "") -> bytes:
    return MESSAGES["HealthCheckRequest"](service=service).SerializeToString()


@pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService", "grpc.health.v1.Health"])
async def test_a_server_that_serves_says_so_to_anybody(client: Http2Client, service: str) -> None:
    answer = await client.call(CHECK, asked(service))
    (message,) = answer.messages("HealthCheckResponse")
    assert message.status == SERVING


async def test_a_service_that_is_unknown_is_not_found(client: Http2Client) -> None:
    assert (await client.call(CHECK, asked("other"))).status == 5


async def test_a_watcher_hears_of_changes(front: Front, client: Http2Client) -> None:
    number = await client.open(WATCH)
    await client.send_message(number, asked())
    while not client.answers[number].body:
        assert await client.read()
    front.state.begin_drain()
    answer = await client.answer(number)
    told = [message.status for message in answer.messages("HealthCheckResponse")]
    assert (told, answer.status) == ([SERVING, NOT_SERVING], 14)


async def test_a_watcher_of_nothing_is_told_so_and_waits(client: Http2Client) -> None:
    number = await client.open(WATCH)
    await client.send_message(number, asked("other"))
    while not client.answers[number].body:
        assert await client.read()
    (message,) = client.answers[number].messages("HealthCheckResponse")
    assert message.status == UNKNOWN
    assert not client.answers[number].ended
