"""GET /metrics: what the engine and the server have measured, in Prometheus' text format.

What vLLM measures, too, has vLLM's names and labels, because dashboards, autoscalers and routers
know those; what only this server has is `kttrio:`. Prefixes are not kept, so nothing is said of
hits. All is read at the scrape: nothing here runs between two of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import trio
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from quart import Blueprint, Response
from quart_trio.wrappers import TrioResponse

from kttrio.engine.measures import Histogram
from kttrio.server.failures import log_failure
from kttrio.server.schema.operations import STRING, Operation
from kttrio.server.state import AppState

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Whatever a scraper would rather have: every one reads this, and newer formats make underscores
of the colons in names for all who do not say that they read colons."""
COUNT_SECONDS = 1.0
"""A scrape waits so long for what only the runner knows, and goes without it then."""
REASONS = ("stop", "length", "abort", "error")
OPERATIONS = (
    Operation(
        method="get",
        path="/metrics",
        summary="What the server has measured, for Prometheus.",
        tag="Operation",
        answer=STRING,
        answer_type="text/plain",
        open=True,
    ),
)


def blueprint(state: AppState) -> Blueprint:
    """The route over one server's state."""
    routes = Blueprint("metrics", __name__)
    counting = trio.CapacityLimiter(1)
    process = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=process)

    @routes.get("/metrics")
    async def metrics() -> Response:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(ServerCollector(state, await _counts(state, counting)))
        registry.register(process)
        return TrioResponse(generate_latest(registry), content_type=CONTENT_TYPE)

    return routes


async def _counts(state: AppState, limiter: trio.CapacityLimiter) -> Mapping[str, object]:
    """What the runner counts; nothing where a long step keeps it from answering, or where it is
    broken: then all else is worth the more."""
    if state.count is None or not limiter.available_tokens:
        return {}
    try:
        with trio.move_on_after(COUNT_SECONDS):
            count = state.count
            return await trio.to_thread.run_sync(count, abandon_on_cancel=True, limiter=limiter)
    except Exception as error:
        log_failure(logger, "the runner could not count", error)
    return {}


@dataclass(frozen=True, slots=True, eq=False)
class ServerCollector(Collector):
    """One server at one moment."""

    state: AppState
    counts: Mapping[str, object]

    def collect(self) -> Iterator[Metric]:
        yield from self._engine()
        yield from self._drafts()
        yield from self._requests()
        yield from self._steps()
        yield from self._experts()
        yield self._visits()
        meter = self.state.meter
        yield self._gauge("kttrio:connections", "Open connections.", meter.connections)
        help = "Connections refused by --max-connections."
        yield self._counter("kttrio:refused_connections", help, meter.refused_connections)
        num_tasks = trio.lowlevel.current_statistics().tasks_living
        yield self._gauge("kttrio:tasks", "Tasks of the event loop.", num_tasks)

    def _engine(self) -> Iterator[Metric]:
        stats, measures = self.state.engine.stats, self.state.engine.measures
        used = stats.num_pages - stats.free_pages
        yield self._gauge("vllm:num_requests_running", "Sequences in the batch.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait.", stats.waiting)
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "KV cache in use, 1 is all.", used / max(stats.num_pages, 1)
        )
        yield self._counter("vllm:num_preemptions", "Sequences put back.", stats.preemptions)
        yield self._counter(
            "vllm:prompt_tokens", "Prompt tokens computed.", measures.num_prompt_tokens
        )
        yield self._counter("vllm:generation_tokens", "Tokens drawn.", stats.generated_tokens)
        yield self._gauge("kttrio:healthy", "Whether /health says so.", float(stats.healthy))

    def _drafts(self) -> Iterator[Metric]:
        if not self.state.engine.speculates:
            return
        stats, name = self.state.engine.stats, "vllm:spec_decode_num"
        yield self._counter(f"{name}_draft_tokens", "Drafts verified.", stats.draft_tokens)
        yield self._counter(
            f"{name}_accepted_tokens", "Drafts that became output.", stats.accepted_draft_tokens
        )

    def _requests(self) -> Iterator[Metric]:
        meter, measures = self.state.meter, self.state.engine.measures
        for name, help, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token.", meter.first_tokens),
            ("inter_token_latency_seconds", "Between tokens of a sequence.", measures.gaps),
            ("e2e_request_latency_seconds", "From arrival to the end.", meter.requests),
            ("request_queue_time_seconds", "Before the first step.", measures.queue),
            ("request_prompt_tokens", "Tokens of a request's prompts.", meter.prompt_tokens),
            ("request_generation_tokens", "Tokens of its answers.", meter.output_tokens),
        ):
            family = HistogramMetricFamily(f"vllm:{name}", help, labels=["model_name"])
            _fill(family, [self.state.model.name], histogram)
            yield family
        labels = ["model_name", "finished_reason"]
        ends = CounterMetricFamily("vllm:request_success", "Answers that ended.", labels=labels)
        counts = dict.fromkeys(REASONS, 0)
        for reason, count in meter.ends.items():
            counts["stop" if reason == "tool_calls" else reason] += count
        for reason, count in counts.items():
            ends.add_metric([self.state.model.name, reason], count)
        yield ends

    def _steps(self) -> Iterator[Metric]:
        stats, measures = self.state.engine.stats, self.state.engine.measures
        yield self._counter("kttrio:steps", "Steps, failed ones included.", stats.steps)
        yield self._counter("kttrio:failed_steps", "Steps that failed.", stats.failed_steps)
        steps = HistogramMetricFamily(
            "kttrio:step_seconds",
            "The runner's time for a step: decodes alone, or prompts, maybe beside them.",
            labels=["model_name", "kind"],
        )
        _fill(steps, [self.state.model.name, "prefill"], measures.prefills)
        _fill(steps, [self.state.model.name, "decode"], measures.decodes)
        yield steps
        for name, help, histogram in (
            ("delivery", "The event loop's time to hand out a step's tokens.", measures.deliveries),
            ("event_loop_lag", "How late the event loop runs what is due.", self.state.meter.lag),
        ):
            family = HistogramMetricFamily(f"kttrio:{name}_seconds", help, labels=["model_name"])
            _fill(family, [self.state.model.name], histogram)
            yield family

    def _experts(self) -> Iterator[Metric]:
        share, swaps = self.counts.get("served_by_device_experts"), self.counts.get("expert_swaps")
        if isinstance(share, float):
            help = "Of what tokens choose, the share that experts on the device serve."
            yield self._gauge("kttrio:device_expert_hit_rate", help, share)
        if isinstance(swaps, int):
            yield self._counter("kttrio:expert_swaps", "Experts that came to the device.", swaps)

    def _visits(self) -> Metric:
        labels = ["method", "handler", "status"]
        family = CounterMetricFamily("http_requests", "Requests over HTTP and gRPC.", labels=labels)
        for (method, route, status), count in self.state.meter.visits.items():
            family.add_metric([method, route, str(status)], count)
        return family

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help, labels=["model_name"])
        family.add_metric([self.state.model.name], value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(name, help, labels=["model_name"])
        family.add_metric([self.state.model.name], value)
        return family


def _fill(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    """Counts as Prometheus has them: of all values up to each bound."""
    below, buckets = 0, []
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        below += count
        buckets.append((str(float(bound)) if bound != float("inf") else "+Inf", below))
    family.add_metric(labels, buckets=buckets, sum_value=histogram.sum)
