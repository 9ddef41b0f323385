"""Which call of gRPC goes where, and who may call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from kttrio.server.grpc import health as grpc_health
from kttrio.server.grpc import inference as grpc_inference
from kttrio.server.grpc.call import Call, is_grpc
from kttrio.server.grpc.health import HealthService
from kttrio.server.grpc.inference import InferenceService
from kttrio.server.grpc.status import RpcError, Status
from kttrio.server.keys import Keys, presented
from kttrio.server.state import AppState
from kttrio.server.visits import NO_ROUTE, SHOWN_PATH, VISIT, Journal, Visit, request_id
from kttrio.server.wire.http2_stream import Stream

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
        self._journal = Journal(state.config, state.meter)
        self._keys = Keys(state.config)
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
        visit = self._open(stream)
        VISIT.set(visit)
        try:
            await Call(stream, visit, self._config).run(self._run)
        finally:
            self._journal.note(visit)

    def _open(self, stream: Stream) -> Visit:
        path = stream.headers.get(b":path", b"").decode("latin-1")
        return Visit(
            id=request_id(stream.headers),
            method="gRPC",
            path=path[:SHOWN_PATH],
            client=stream.client,
            route=path if path in self._methods else NO_ROUTE,
            status=Status.CANCELLED,
            polled=path in POLLED,
        )

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
