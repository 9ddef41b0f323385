"""Routes that record which experts requests use, named as SGLang names them.

Start, send the requests, stop, dump. What is written, and where to, the settings say.
"""

from __future__ import annotations

import trio
from quart import Blueprint, Response

from kttrio.server.errors import ApiError
from kttrio.server.replies import json_response
from kttrio.server.schema.operations import BOOLEAN, INTEGER, STRING, Operation, record_of
from kttrio.server.state import AppState, Recording

METHODS = ("get", "post")
WORDS = {
    "start": "Record from the next step on, anew.",
    "stop": "Record no further.",
    "dump": "Write what was recorded to a file, and forget it.",
}
OPERATIONS = tuple(
    Operation(
        method=method,
        path=f"/{word}_expert_distribution_record",
        summary=summary,
        tag="Operation",
        answer=record_of({"recording": BOOLEAN, "steps": INTEGER}, file=STRING),
    )
    for word, summary in WORDS.items()
    for method in METHODS
)


def blueprint(state: AppState) -> Blueprint:
    """The routes over one server's state."""
    routes = Blueprint("recording", __name__)

    @routes.route("/start_expert_distribution_record", methods=["GET", "POST"])
    async def start() -> Response:
        """Record from the next step on; what was not dumped is forgotten."""
        recording = _recording(state)
        recording.start()
        return _answer(recording)

    @routes.route("/stop_expert_distribution_record", methods=["GET", "POST"])
    async def stop() -> Response:
        recording = _recording(state)
        recording.stop()
        return _answer(recording)

    @routes.route("/dump_expert_distribution_record", methods=["GET", "POST"])
    async def dump() -> Response:
        """Write a file and forget what is in it; a recording that is on goes on."""
        recording = _recording(state)
        try:
            file = await trio.to_thread.run_sync(recording.dump)
        except OSError as error:
            message = f"Nothing was dumped, and nothing forgotten: {error}"
            raise ApiError(500, message, code="dump_failed") from error
        if file is None:
            message = "No step was recorded: POST /start_expert_distribution_record, then requests."
            raise ApiError(409, message, code="nothing_recorded")
        return _answer(recording, file=str(file))

    return routes


def _recording(state: AppState) -> Recording:
    if state.recording is None:
        message = (
            "This server does not record: start it with --expert-distribution-recorder-mode stat."
        )
        raise ApiError(409, message, code="recording_unavailable")
    return state.recording


def _answer(recording: Recording, **more: str) -> Response:
    """`steps`: that a dump would write."""
    return json_response({"recording": recording.is_on, "steps": recording.num_kept, **more})
