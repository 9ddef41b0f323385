"""Routes for whoever watches the server: is it well, and what does it serve.

What only operators may do is in control.py, what is counted in metrics.py.
"""

from __future__ import annotations

import trio
from quart import Blueprint, Response

from kttrio.engine.errors import EngineClosed, QueueFull, RequestTooLarge
from kttrio.request import GenerateRequest, SamplingParams
from kttrio.server.completion import refusal
from kttrio.server.errors import ApiError
from kttrio.server.ids import new_id
from kttrio.server.replies import json_response
from kttrio.server.schema.operations import INTEGER, NUMBER, STRING, Operation, record_of
from kttrio.server.state import AppState, installed_version

GENERATE_SECONDS = 30.0
WATCH_SECONDS = 0.02
TAG = "Operation"
OPERATIONS = (
    *(
        Operation(
            method="get",
            path=path,
            summary="Whether requests are taken and steps succeed.",
            tag=TAG,
            answer=record_of({"status": STRING}),
            error=record_of({"status": STRING, "reason": STRING}),
            open=True,
        )
        for path in ("/health", "/ping")
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
        path="/version",
        summary="The version of kttrio.",
        tag=TAG,
        answer=record_of({"version": STRING}),
    ),
    *(
        Operation(
            method="get",
            path=path,
            summary="The model and its longest sequence.",
            tag=TAG,
            answer=record_of({"model_path": STRING, "max_model_len": INTEGER}),
        )
        for path in ("/get_model_info", "/model_info")
    ),
)


def blueprint(state: AppState) -> Blueprint:
    """The routes over one server's state."""
    routes = Blueprint("admin", __name__)

    @routes.get("/health")
    @routes.get("/ping")
    async def health() -> Response:
        """200 while requests are taken and steps succeed. Touches nothing that could be slow."""
        if (trouble := state.trouble) is not None:
            return json_response({"status": "unhealthy", "reason": trouble}, 503)
        return json_response({"status": "ok"})

    @routes.get("/health_generate")
    async def health_generate() -> Response:
        """200 when the model really drew a token just now."""
        started = trio.current_time()
        await _see_a_token(state)
        return json_response({"status": "ok", "seconds": trio.current_time() - started})

    @routes.get("/version")
    async def version() -> Response:
        return json_response({"version": installed_version()})

    @routes.get("/get_model_info")
    @routes.get("/model_info")
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


async def _see_a_token(state: AppState) -> None:
    """Where others wait already it is one of theirs: a probe must not take a busy server, which
    would refuse it or let it wait, for a sick one."""
    try:
        with trio.fail_after(GENERATE_SECONDS):
            await (_next_token(state) if state.engine.stats.waiting else _generate_one(state))
    except trio.TooSlowError:
        message = f"The model drew no token within {GENERATE_SECONDS:g} s."
        raise ApiError(503, message, code="engine_timeout") from None


async def _next_token(state: AppState) -> None:
    drawn = state.engine.stats.generated_tokens
    while state.engine.stats.generated_tokens == drawn:
        if (trouble := state.trouble) is not None:
            raise ApiError(503, f"The engine drew no token: {trouble}.", code="engine_error")
        await trio.sleep(WATCH_SECONDS)


async def _generate_one(state: AppState) -> None:
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    prompt = (min(state.model.end_ids, default=0),)
    try:
        async with state.engine.open(
            GenerateRequest(new_id("health-"), prompt, sampling)
        ) as events:
            event = await events.wait()
    except (RequestTooLarge, QueueFull, EngineClosed) as error:
        raise refusal(error) from error
    if event.token is None:
        raise ApiError(503, event.error or "The engine drew no token.", code="engine_error")
