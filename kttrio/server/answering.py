"""From a prepared request to its answer, whole or streamed. The same for every protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kttrio.server import sse
from kttrio.server.completion import Collector, Completion, Listener
from kttrio.server.decoding import Answer
from kttrio.server.errors import ApiError
from kttrio.server.prompting import Intake, Prepared
from kttrio.server.replies import LiveResponse
from kttrio.server.state import AppState
from kttrio.server.visits import current_id
from kttrio.server.wire.connection import SCOPE_KEY


def open_intake(state: AppState, request_id: str, num_bytes: int) -> Intake:
    """What preparing a request of `num_bytes` needs beside it."""
    return Intake(
        request_id=request_id,
        num_bytes=num_bytes,
        context_length=state.engine.longest_sequence,
        most_sequences=state.engine.most_sequences,
        seed=state.seeds.getrandbits(63),
        constraints=state.constraints,
        visit_id=current_id(),
    )


async def collect(state: AppState, prepared: Prepared) -> tuple[list[Answer], Completion]:
    """Run a request that is answered as a whole: an answer for each choice, and whoever knows its
    usage. A client that leaves cancels it. Raises ApiError."""
    collector = Collector(len(prepared.requests))
    completion = Completion(prepared, collector, state.meter)
    with state.track(completion):
        async with completion.open(state.engine):
            return await collector.answers(), completion


def stream(
    state: AppState,
    prepared: Prepared,
    listen: Callable[[sse.EventStream], Listener],
    *,
    keep_alive: bytes = sse.KEEP_ALIVE,
    patient: bool = False,
) -> LiveResponse:
    """A response whose events the engine's fan-out pushes; its task waits for their end.
    `keep_alive`: what it carries while there are none. `patient`: it begins with the first event,
    and what fails before is an HTTP error."""

    async def run(scope: Any, send: sse.Send) -> None:
        connection = scope["state"][SCOPE_KEY]
        chunked = scope["http_version"] == "1.1"
        events = sse.EventStream(
            connection, chunked=chunked, keep_alive=keep_alive, patient=patient
        )
        completion = Completion(prepared, listen(events), state.meter)
        try:
            with state.track(completion):
                async with completion.open(state.engine):
                    await events.run(send, state.config.stream_keepalive_seconds)
        except ApiError:
            if not events.begun:
                raise
            connection.cut()  # there is no other way left to tell that the answer is incomplete

    return LiveResponse(run)
