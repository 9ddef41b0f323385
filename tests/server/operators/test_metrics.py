"""/metrics: what Prometheus reads is what happened."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from kttrio.config import EngineConfig, ServerConfig
from kttrio.server import meter
from kttrio.server.operators import metrics
from tests.http2_client import INFERENCE, http2_client
from tests.http_front import MODEL, Front, Reply, chat_body, running_front

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def samples(reply: Reply) -> Samples:
    """Values by name and labels."""
    assert reply.status == 200
    return {
        (sample.name, frozenset(sample.labels.items()) - {("model_name", MODEL)}): sample.value
        for family in text_string_to_metric_families(reply.body.decode())
        for sample in family.samples
    }


async def scrape(front: Front) -> Samples:
    return samples(await front.ask("GET", "/metrics"))


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


async def test_counts_of_requests_and_tokens() -> None:
    async with running_front() as front:
        reply = (await front.chat(n=2)).json()
        assert (await front.complete(["Hi", "Ho!"], max_tokens=3, stream=True)).status == 200
        assert (await front.chat(temperature=-1)).status == 400
        await front.idle()
        found = await scrape(front)
        usage = reply["usage"]
        drawn = usage["completion_tokens"] + 6
        assert value(found, "vllm:generation_tokens_total") == drawn
        assert value(found, "vllm:request_generation_tokens_sum") == drawn
        assert value(found, "vllm:request_generation_tokens_count") == 2
        assert value(found, "vllm:request_success_total", finished_reason="stop") == 2
        assert value(found, "vllm:request_success_total", finished_reason="length") == 2
        assert value(found, "vllm:request_success_total", finished_reason="error") == 0
        told = value(found, "vllm:request_prompt_tokens_sum") - usage["prompt_tokens"]
        # the prompt of two choices is computed for each
        computed = 2 * usage["prompt_tokens"] + told
        assert value(found, "vllm:prompt_tokens_total") == computed
        route = {"handler": "/v1/chat/completions", "method": "POST"}
        assert value(found, "http_requests_total", **route, status="200") == 1
        assert value(found, "http_requests_total", **route, status="400") == 1


async def test_the_engine_at_this_moment() -> None:
    async with running_front(engine_config=EngineConfig(max_running_requests=1), delay=0.002) as f:
        f.script.endless = True
        clients = [await f.connect() for _ in range(3)]
        for client in clients:
            await client.send("POST", "/v1/chat/completions", chat_body(max_tokens=900))
        while f.state.engine.stats.waiting < 2:
            await trio.lowlevel.checkpoint()
        found = await scrape(f)
        assert value(found, "vllm:num_requests_running") == 1
        assert value(found, "vllm:num_requests_waiting") == 2
        assert 0 < value(found, "vllm:kv_cache_usage_perc") < 1
        assert value(found, "kttrio:healthy") == 1
        for client in clients:
            await client.stream.aclose()
        await f.idle()
        assert value(await scrape(f), "vllm:kv_cache_usage_perc") == 0


async def test_histograms_add_up_and_times_are_plausible() -> None:
    async with running_front(delay=0.02) as front:
        assert (await front.chat(max_tokens=5, ignore_eos=True)).status == 200
        await front.idle()
        found = await scrape(front)
        for name, count, least in (
            ("vllm:time_to_first_token_seconds", 1, 0.02),
            ("vllm:inter_token_latency_seconds", 4, 0.08),
            ("vllm:e2e_request_latency_seconds", 1, 0.1),
            ("vllm:request_queue_time_seconds", 1, 0.0),
            ("kttrio:delivery_seconds", 5, 0.0),
        ):
            assert value(found, f"{name}_count") == count
            assert least <= value(found, f"{name}_sum") < least + 0.5
            assert value(found, f"{name}_bucket", le="+Inf") == count
        assert value(found, "kttrio:step_seconds_count", kind="prefill") == 1
        assert value(found, "kttrio:step_seconds_count", kind="decode") == 4
        assert value(found, "vllm:inter_token_latency_seconds_bucket", le="0.01") == 0


async def test_failed_steps_and_requests_are_counted() -> None:
    async with running_front(fail_steps=(0,)) as front:
        assert (await front.chat()).status == 500
        found = await scrape(front)
        assert value(found, "kttrio:failed_steps_total") == 1
        assert value(found, "kttrio:healthy") == 0
        assert value(found, "vllm:request_success_total", finished_reason="error") == 1
        assert value(found, "vllm:time_to_first_token_seconds_count") == 0


async def test_drafts_are_counted_where_there_are_some() -> None:
    async with running_front(num_drafts=2) as front:
        assert (await front.chat()).status == 200
        found = await scrape(front)
        drafted = value(found, "vllm:spec_decode_num_draft_tokens_total")
        assert 0 < value(found, "vllm:spec_decode_num_accepted_tokens_total") < drafted
    async with running_front() as front:
        assert not [name for name, _ in await scrape(front) if "spec_decode" in name]


async def test_what_the_runner_counts() -> None:
    async with running_front() as front:
        front.state.count = lambda: {"served_by_device_experts": 0.75, "expert_swaps": 12}
        found = await scrape(front)
        assert value(found, "kttrio:device_expert_hit_rate") == 0.75
        assert value(found, "kttrio:expert_swaps_total") == 12


async def test_a_runner_in_a_long_step_holds_up_no_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "COUNT_SECONDS", 0.01)
    ends, asked = threading.Event(), []

    def count() -> dict[str, object]:
        asked.append(1)
        ends.wait(10)
        return {"expert_swaps": 1}

    async with running_front() as front:
        front.state.count = count
        for _ in range(3):
            assert "kttrio:expert_swaps_total" not in {name for name, _ in await scrape(front)}
        assert len(asked) == 1
        ends.set()


async def test_a_broken_runner_takes_nothing_else_away(caplog: pytest.LogCaptureFixture) -> None:
    def count() -> dict[str, object]:
        raise RuntimeError("the device is gone")

    async with running_front() as front:
        front.state.count = count
        found = await scrape(front)
        assert value(found, "kttrio:healthy") == 1
        assert "kttrio:expert_swaps_total" not in {name for name, _ in found}
    assert "the runner could not count" in caplog.text


async def test_labels_stay_few_whatever_clients_send() -> None:
    async with running_front() as front:
        for path in ("/a", "/b", "/v1/models/x", "/v1/models/y/z"):
            await front.ask("GET", path)
        await front.ask("BREW", "/coffee")
        visits = [labels for name, labels in await scrape(front) if name == "http_requests_total"]
        assert {dict(labels)["handler"] for labels in visits} == {"none", "/v1/models/<path:name>"}
        assert {dict(labels)["method"] for labels in visits} == {"GET", "OTHER"}


async def test_connections_and_calls_of_grpc() -> None:
    config = ServerConfig(grpc_port=0, max_connections=2)
    async with running_front(config=config) as front, http2_client(front) as client:
        await client.infer(max_tokens=2)
        kept = await front.connect()
        assert value(samples(await kept.ask("GET", "/metrics")), "kttrio:connections") == 2
        assert (await front.ask("GET", "/health")).status == 503
        found = samples(await kept.ask("GET", "/metrics"))
        assert value(found, "kttrio:refused_connections_total") == 1
        call = {"method": "gRPC", "handler": f"{INFERENCE}/ModelInfer", "status": "0"}
        assert value(found, "http_requests_total", **call) == 1


@pytest.mark.parametrize(
    "accepted",
    [
        "",
        "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;q=0.3",
    ],
)
async def test_names_are_the_same_for_every_scraper(accepted: str) -> None:
    async with running_front() as front:
        reply = await front.ask("GET", "/metrics", Accept=accepted)
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert value(samples(reply), "vllm:num_requests_running") == 0


async def test_the_event_loops_lag_is_watched(autojump_clock: trio.testing.MockClock) -> None:
    found = meter.Meter()
    with trio.move_on_after(1.05):
        await meter.watch_lag(found)
    assert sum(found.lag.counts) == 10
    assert found.lag.sum == pytest.approx(0, abs=1e-6)
