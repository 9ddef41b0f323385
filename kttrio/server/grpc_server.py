"""Which call of gRPC goes where, and who may call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from kttrio.server import grpc_health, grpc_inference
from kttrio.server.grpc_call import Call, is_grpc
from kttrio.server.grpc_health import HealthService
from kttrio.server.grpc_inference import InferenceService
from kttrio.server.grpc_status import RpcError, Status
from kttrio.server.http2 import Stream
from kttrio.server.keys import Keys, presented
from kttrio.server.state import AppState
from kttrio.server.visits import Visits

INFERENCE, HEALTH = f"/{grpc_inference.NAME}", f"/{grpc_health.NAME}"
POLLED = frozenset(
    {f"{HEALTH}/Check", f"{HEALTH}/Watch", f"{INFERENCE}/ServerLive", f"{INFERENCE}/ServerReady"}
)
"""What monitors ask every few seconds; they seldom have a key, and learn nothing worth one."""

Run = Callable[[Call], Awaitable[None]]


class GrpcServer:
    """The services of one server."""

    def __init__(self, state: AppState) -> None:
        self._config = state.config
        self._keys = Keys(state.config)
        self._visits = Visits(state.config, state.meter.calls, polled=POLLED)
        inference, health = InferenceService(state), HealthService(state)
        self._methods: dict[str, Run] = {
            f"{HEALTH}/Check": health.check,
            f"{HEALTH}/Watch": health.watch,
            f"{INFERENCE}/ModelStreamInfer": inference.stream,
        }
        for name in inference.unary:
            self._methods[f"{INFERENCE}/{name}"] = partial(inference.answer, method=name)

    async def serve(self, stream: Stream) -> None:
        """Answer one call."""
        if not is_grpc(stream):
            return
        config, fields = self._config, stream.headers
        given = fields.get(b"x-request-id", b"")
        visit = self._visits.open("POST", fields.get(b":path", b""), stream.client, given)
        call = Call(
            stream,
            request_id=visit.id,
            max_message_bytes=config.max_body_bytes,
            body_timeout=config.body_timeout,
        )
        if call.path in self._methods:
            visit.route = call.path
        try:
            await call.run(self._run)
        finally:
            visit.status = call.status.name
            self._visits.close(visit)

    async def _run(self, call: Call) -> None:
        if call.path not in POLLED:
            given = presented(call.metadata("authorization"), call.metadata("x-api-key"))
            self._keys.check(given, admin=False)
        if (method := self._methods.get(call.path)) is None:
            raise RpcError(
                Status.UNIMPLEMENTED,
                f"There is no {call.path[:200]} here: traces, log settings and shared memory are "
                "not offered.",
            )
        await method(call)
