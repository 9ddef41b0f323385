"""Faults of the host's experts, through a whole server: they cost requests, never the server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from kttrio.client import StatusError
from kttrio.config import (
    DeviceConfig,
    EngineConfig,
    ExpertConfig,
    ModelConfig,
    PlacementConfig,
    RunnerConfig,
    ServerConfig,
)
from kttrio.experts.selfcheck import ExpertsDiffer
from kttrio.experts.slots import pinned_expert
from kttrio.serve import Parts, ServerFailed, Settings, build_parts, serve
from tests.golden import FIXTURES
from tests.test_serve import Face, Server

SECONDS = 120
DIRECTORY = FIXTURES / "qwen3_next_chat"
WAYS = {
    "both sides": PlacementConfig(kt_num_gpu_experts=2),
    "long prompts": PlacementConfig(
        kt_num_gpu_experts=2, kt_gpu_prefill_token_threshold=8, kt_ring_experts=4
    ),
    "dynamic update": PlacementConfig(kt_num_gpu_experts=2, kt_enable_dynamic_expert_update=True),
}


def settings(placement: PlacementConfig, cache: Path) -> Settings:
    return Settings(
        RunnerConfig(
            ModelConfig(model=DIRECTORY, dtype="bfloat16"),
            ExpertConfig(kt_cpuinfer=2, kt_cache_dir=cache),
            EngineConfig(max_running_requests=4, max_total_tokens=4096),
            DeviceConfig(device="cpu"),
            placement,
        ),
        ServerConfig(port=0, drain_seconds=1),
    )


@asynccontextmanager
async def serving(placement: PlacementConfig, cache: Path) -> AsyncIterator[tuple[Server, Any]]:
    """A real server in this process, and the bank of its model."""
    server, built = Server(Face()), []

    def build(given: Settings, face: Any) -> Parts:
        built.append(build_parts(given, face))
        return built[0]

    with trio.fail_after(SECONDS):
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                await serve(settings(placement, cache), server.face, build=build)

            nursery.start_soon(run)
            await server.face.listens.wait()
            yield server, built[0].runner._model.bank
            nursery.cancel_scope.cancel()


@contextmanager
def absent(bank: Any):
    """Within the block the host has none of its experts."""
    kept = []
    for layer, table in zip(bank.host_layers, bank.sides.residencies, strict=True):
        for expert in (~table.mask).nonzero().flatten().tolist():
            matrices = pinned_expert(bank.sides.slots.shape, bank.sides.division.device)
            matrices.unpack_from(layer, expert)
            layer.clear_expert(expert)
            kept.append((layer, expert, matrices))
    yield
    for layer, expert, matrices in kept:
        matrices.pack_into(layer, expert)


CHAT = json.loads((DIRECTORY / "golden.json").read_text())[0]
BODY = {"model": DIRECTORY.name, "messages": CHAT["messages"], "temperature": 0, "max_tokens": 60}


async def answer(client: Any) -> None:
    reply = await client.post_json("/v1/chat/completions", BODY)
    assert reply["usage"]["completion_tokens"] == len(CHAT["answer_ids"])
    assert reply["choices"][0]["message"]["content"] in CHAT["answer"]


async def status(client: Any, path: str) -> int:
    try:
        await client.get_json(path)
    except StatusError as error:
        return error.status
    return 200


@pytest.mark.parametrize("way", WAYS)
async def test_a_failing_expert_fails_its_requests_and_the_next_ones_are_answered(
    way: str, tmp_path: Path
) -> None:
    async with serving(WAYS[way], tmp_path) as (server, bank), server.client() as client:
        await answer(client)
        assert await status(client, "/health") == 200
        with absent(bank):
            with pytest.raises(StatusError) as refused:
                await client.post_json("/v1/chat/completions", BODY)
            assert refused.value.status == 500
            async with client.stream("/v1/chat/completions", BODY | {"stream": True}) as events:
                told = [event async for event in events]
            assert any("error" in event.data for event in told)
            assert await status(client, "/health") == 503
            assert await status(client, "/health_generate") == 503
        await answer(client)
        assert await status(client, "/health") == 200


async def test_others_go_on_beside_a_long_prompt_that_fails(tmp_path: Path) -> None:
    """The ring cannot unpack what is not there; a short request needs none of it."""
    async with serving(WAYS["long prompts"], tmp_path) as (server, bank):
        ring, outcome = bank.sides.ring, []

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("no expert comes through")

        async def long(client: Any) -> None:
            try:
                await client.post_json("/v1/chat/completions", BODY)
            except StatusError as error:
                outcome.append(error.status)

        async def short(client: Any) -> None:
            body = {"model": DIRECTORY.name, "prompt": "Hi", "max_tokens": 30, "ignore_eos": True}
            reply = await client.post_json("/v1/completions", body)
            outcome.append(reply["usage"]["completion_tokens"])

        feed, ring._feeders.feed = ring._feeders.feed, broken
        async with server.client() as one, server.client() as other, trio.open_nursery() as both:
            both.start_soon(long, one)
            both.start_soon(short, other)
        assert sorted(outcome) == [30, 500]
        ring._feeders.feed = feed
        async with server.client() as client:
            await answer(client)


def test_experts_that_differ_from_the_checkpoint_are_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: object) -> None:
        raise ExpertsDiffer("self-check: experts on the device give something else")

    monkeypatch.setattr("kttrio.models.loading.check_experts", check)
    with pytest.raises(ServerFailed, match="self-check: experts on the device"):
        build_parts(settings(WAYS["both sides"], tmp_path), Face())
