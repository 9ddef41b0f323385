"""The route that keeps what the server knows of the experts in use, for its next start."""

from __future__ import annotations

import trio
from quart import Blueprint, Response

from kttrio.server.errors import ApiError
from kttrio.server.replies import json_response
from kttrio.server.schema.operations import INTEGER, STRING, Operation, record_of
from kttrio.server.state import AppState

OPERATIONS = (
    Operation(
        method="post",
        path="/save_expert_placement",
        summary="Keep what is known of the experts in use, for the next start.",
        tag="Operation",
        answer=record_of({"file": STRING, "swaps": INTEGER}),
    ),
)


def blueprint(state: AppState) -> Blueprint:
    """The route over one server's state."""
    routes = Blueprint("placement", __name__)

    @routes.post("/save_expert_placement")
    async def save() -> Response:
        """Write the file, over what is there; it is also written when the server ends."""
        if state.placement is None:
            message = (
                "This server does not follow the experts in use: start it with "
                "--kt-enable-dynamic-expert-update."
            )
            raise ApiError(409, message, code="placement_unavailable")
        try:
            file = await trio.to_thread.run_sync(state.placement.save)
        except OSError as error:
            message = f"Nothing was saved, what was there still is: {error}"
            raise ApiError(500, message, code="save_failed") from error
        return json_response({"file": str(file), "swaps": state.placement.num_swaps})

    return routes
