"""Routes for operators alone: what concerns the whole server, or the requests of other people.
With `--admin-api-key` they take no other key. Named as SGLang names them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import trio
from quart import Blueprint, Response

from kttrio.server.bodies import read_body
from kttrio.server.errors import BadRequestError
from kttrio.server.replies import json_response
from kttrio.server.schema import records
from kttrio.server.schema.kinds import Boolean, Text
from kttrio.server.schema.operations import BOOLEAN, INTEGER, OBJECT, STRING, Operation, record_of
from kttrio.server.schema.records import given
from kttrio.server.state import AppState, installed_version


@dataclass(frozen=True, slots=True)
class AbortBody:
    """The body of /abort_request."""

    rid: str | None = given(
        Text(least=1),
        "the request's X-Request-Id, the id of its answer, or the rid that it was sent with",
    )
    abort_all: bool = given(Boolean(), "abort every request", default=False)


TAG = "Operation"
OPERATIONS = (
    Operation(
        method="post",
        path="/abort_request",
        summary="End requests with what they have.",
        tag=TAG,
        body=AbortBody,
        answer=record_of({"aborted": INTEGER}),
    ),
    *(
        Operation(
            method=method,
            path="/flush_cache",
            summary="Forget the prefixes that are kept: there are none.",
            tag=TAG,
            answer=record_of({"success": BOOLEAN, "message": STRING}),
        )
        for method in ("get", "post")
    ),
    *(
        Operation(
            method="get",
            path=path,
            summary="Settings, and what the server is doing.",
            tag=TAG,
            answer=OBJECT,
        )
        for path in ("/get_server_info", "/server_info")
    ),
)


def blueprint(state: AppState) -> Blueprint:
    """The routes over one server's state."""
    routes = Blueprint("control", __name__)

    @routes.post("/abort_request")
    async def abort_request() -> Response:
        """End requests with what they have. One that is not there, or not any more, is no error:
        it may have ended a moment ago."""
        asked, _ = await read_body(partial(records.read, AbortBody))
        if asked.rid is None and not asked.abort_all:
            raise BadRequestError("Name the request by 'rid', or set 'abort_all'.", "rid")
        return json_response({"aborted": state.abort(None if asked.abort_all else asked.rid)})

    @routes.route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache() -> Response:
        """Nothing to do: every prompt is computed anew, whatever came before it."""
        message = "No prefixes are kept between requests: there is nothing to flush."
        return json_response({"success": True, "message": message})

    @routes.get("/get_server_info")
    @routes.get("/server_info")
    async def server_info() -> Response:
        counts = {} if state.count is None else await trio.to_thread.run_sync(state.count)
        return json_response(_info(state, counts))

    return routes


def _info(state: AppState, counts: Any) -> dict[str, Any]:
    return {
        **state.settings,
        **counts,
        "model": state.model.name,
        "version": installed_version(),
        "context_length": state.engine.longest_sequence,
        "weight_version": state.config.weight_version,
        "draining": state.draining,
        "live_requests": len(state.live),
        "engine": asdict(state.engine.stats),
    }
