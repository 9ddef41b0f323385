"""Which call of gRPC goes where, and who may call."""

from __future__ import annotations

from kttrio.server.grpc_call import Call, is_grpc
from kttrio.server.grpc_status import RpcError, Status
from kttrio.server.http2 import Stream
from kttrio.server.state import AppState


class GrpcServer:
    """The services of one server."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def serve(self, stream: Stream) -> None:
        """Answer one call."""
        if not is_grpc(stream):
            return
        config = self._state.config
        call = Call(
            stream, max_message_bytes=config.max_body_bytes, body_timeout=config.body_timeout
        )
        await call.run(self._run)

    async def _run(self, call: Call) -> None:
        raise RpcError(Status.UNIMPLEMENTED, f"There is no {call.path[:200]} here.")
