"""Routes for whoever runs the server: is it well, what is it doing, with which settings."""

from __future__ import annotations

from dataclasses import asdict

import trio
from quart import Blueprint, Response

from kttrio.engine.errors import EngineClosed, QueueFull, RequestTooLarge
from kttrio.request import GenerateRequest, SamplingParams
from kttrio.server.completion import refusal
from kttrio.server.errors import ApiError
from kttrio.server.operations import INTEGER, NUMBER, OBJECT, STRING, Operation, record_of
from kttrio.server.replies import json_response
from kttrio.server.state import AppState, new_id

GENERATE_SECONDS = 30.0
TAG = "Operation"
OPERATIONS = (
    Operation(
        method="get",
        path="/health",
        summary="Whether requests are taken and steps succeed.",
        tag=TAG,
        answer=record_of({"status": STRING}),
        error=record_of({"status": STRING, "reason": STRING}),
        open=True,
    ),
    Operation(
        method="get",
        path="/health_generate",
        summary="Whether the model draws a token now.",
        tag=TAG,
        answer=record_of({"status": STRING, "seconds": NUMBER}),
    ),
    Operation(
        method="get",
        path="/get_server_info",
        summary="Settings, and what the server is doing.",
        tag=TAG,
        answer=OBJECT,
    ),
    Operation(
        method="get",
        path="/get_model_info",
        summary="The model and its longest sequence.",
        tag=TAG,
        answer=record_of({"model_path": STRING, "max_model_len": INTEGER}),
    ),
)


def blueprint(state: AppState) -> Blueprint:
    """The routes over one server's state."""
    routes = Blueprint("admin", __name__)

    @routes.get("/health")
    async def health() -> Response:
        """200 while requests are taken and steps succeed. Touches nothing that could be slow."""
        if (trouble := _trouble(state)) is not None:
            return json_response({"status": "unhealthy", "reason": trouble}, 503)
        return json_response({"status": "ok"})

    @routes.get("/health_generate")
    async def health_generate() -> Response:
        """200 when the model really drew a token just now."""
        started = trio.current_time()
        await _generate_one(state)
        return json_response({"status": "ok", "seconds": trio.current_time() - started})

    @routes.get("/get_server_info")
    async def server_info() -> Response:
        counts = {} if state.count is None else await trio.to_thread.run_sync(state.count)
        return json_response(
            {
                **state.settings,
                **counts,
                "model": state.model.name,
                "context_length": state.engine.longest_sequence,
                "weight_version": state.config.weight_version,
                "draining": state.draining,
                "live_requests": len(state.live),
                "engine": asdict(state.engine.stats),
            }
        )

    @routes.get("/get_model_info")
    async def model_info() -> Response:
        return json_response(
            {
                "model_path": state.model.name,
                "is_generation": True,
                "max_model_len": state.engine.longest_sequence,
                "weight_version": state.config.weight_version,
            }
        )

    return routes


def _trouble(state: AppState) -> str | None:
    if state.draining:
        return "the server is shutting down"
    stats = state.engine.stats
    return None if stats.healthy else stats.error or "the engine is not running"


async def _generate_one(state: AppState) -> None:
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    prompt = (min(state.model.end_ids, default=0),)
    try:
        with trio.fail_after(GENERATE_SECONDS):
            async with state.engine.open(GenerateRequest(new_id("health"), prompt, sampling)) as s:
                event = await s.wait()
    except trio.TooSlowError:
        message = f"The model drew no token within {GENERATE_SECONDS:g} s."
        raise ApiError(503, message, code="engine_timeout") from None
    except (RequestTooLarge, QueueFull, EngineClosed) as error:
        raise refusal(error) from error
    if event.token is None:
        raise ApiError(503, event.error or "The engine drew no token.", code="engine_error")
