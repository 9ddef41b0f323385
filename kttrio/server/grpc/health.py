"""grpc.health.v1.Health: whether the server serves, once or for as long as a client watches."""

from __future__ import annotations

import trio

from kttrio.server.grpc.call import Call
from kttrio.server.grpc.inference import NAME as INFERENCE
from kttrio.server.grpc.messages import MESSAGES
from kttrio.server.grpc.status import RpcError, Status
from kttrio.server.grpc.tensors import read_message
from kttrio.server.state import AppState

NAME = "grpc.health.v1.Health"
SERVICES = frozenset({"", INFERENCE, NAME})
"""Those whose health can be asked for; the empty one is the server's."""
LOOK_SECONDS = 0.5


class HealthService:
    """The health of one server."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def check(self, call: Call) -> None:
        """Answer a call of Check. Raises RpcError for a service that is unknown."""
        service = await _asked(call)
        if service not in SERVICES:
            raise RpcError(Status.NOT_FOUND, f"There is no service '{service[:200]}' here.")
        call.send(_response(self._word(service)))

    async def watch(self, call: Call) -> None:
        """Answer a call of Watch: the state now, and whenever it changes, until the server ends."""
        service = await _asked(call)
        told = ""
        while True:
            if (word := self._word(service)) != told:
                call.send(_response(word))
                told = word
            if self._state.draining:
                raise RpcError(Status.UNAVAILABLE, "The server is shutting down.")
            await trio.sleep(LOOK_SECONDS)

    def _word(self, service: str) -> str:
        if service not in SERVICES:
            return "SERVICE_UNKNOWN"
        return "SERVING" if self._state.trouble is None else "NOT_SERVING"


async def _asked(call: Call) -> str:
    return str(read_message("HealthCheckRequest", await call.receive_only()).service)


def _response(word: str) -> bytes:
    return bytes(MESSAGES["HealthCheckResponse"](status=word).SerializeToString())
