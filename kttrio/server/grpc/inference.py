"""inference.GRPCInferenceService: the methods of KServe and Triton, over triton/inference.py."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from google.protobuf.json_format import ParseDict

from kttrio.server.completion import Completion, Usage
from kttrio.server.decoding import Delta
from kttrio.server.errors import ApiError
from kttrio.server.failures import FAILED, log_failure
from kttrio.server.grpc.call import Call
from kttrio.server.grpc.messages import MESSAGES
from kttrio.server.grpc.status import RpcError
from kttrio.server.grpc.tensors import (
    mark_final,
    read_asked,
    read_message,
    read_request,
    write_response,
)
from kttrio.server.off_loop import off_loop
from kttrio.server.state import AppState
from kttrio.server.triton import inference
from kttrio.server.triton.inference import Inference
from kttrio.server.triton.tensors import Tensor
from kttrio.server.wire.http2_stream import ServerEnds

logger = logging.getLogger(__name__)

NAME = "inference.GRPCInferenceService"
MAX_RUNNING = 128
"""Requests of one ModelStreamInfer that run at once; more wait in the client."""

Answer = Callable[[Any], Awaitable[Any]]


class InferenceService:
    """The methods of one server, by name: those with one message each way, and the stream."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self.unary: dict[str, Answer] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._refuse_change,
            "RepositoryModelUnload": self._refuse_change,
            "ModelInfer": self._model_infer,
        }

    async def answer(self, call: Call, method: str) -> None:
        """Answer a call of one of `unary`. Raises ApiError or RpcError."""
        request = read_message(f"{method}Request", await call.receive_only())
        reply = await self.unary[method](request)
        call.send(reply.SerializeToString())

    async def stream(self, call: Call) -> None:
        """Answer a call of ModelStreamInfer. Raises RpcError."""
        await StreamInfer(self._state, call).run()

    async def _server_live(self, request: Any) -> Any:
        return _message("ServerLiveResponse", {"live": True})

    async def _server_ready(self, request: Any) -> Any:
        return _message("ServerReadyResponse", {"ready": self._state.trouble is None})

    async def _model_ready(self, request: Any) -> Any:
        """A model that is not there is not ready, which is no error here."""
        try:
            inference.check_model(self._state, request.name, request.version)
        except ApiError:
            return _message("ModelReadyResponse", {"ready": False})
        return _message("ModelReadyResponse", {"ready": self._state.trouble is None})

    async def _server_metadata(self, request: Any) -> Any:
        return _message("ServerMetadataResponse", inference.server_metadata())

    async def _model_metadata(self, request: Any) -> Any:
        inference.check_model(self._state, request.name, request.version)
        return _message("ModelMetadataResponse", inference.model_metadata(self._state))

    async def _model_config(self, request: Any) -> Any:
        inference.check_model(self._state, request.name, request.version)
        return _message("ModelConfigResponse", {"config": inference.model_config(self._state)})

    async def _model_statistics(self, request: Any) -> Any:
        if request.name:
            inference.check_model(self._state, request.name, request.version)
        stats = inference.model_statistics(self._state)
        return _message("ModelStatisticsResponse", {"model_stats": stats})

    async def _repository_index(self, request: Any) -> Any:
        models = inference.repository_index(self._state, only_ready=request.ready)
        return _message("RepositoryIndexResponse", {"models": models})

    async def _refuse_change(self, request: Any) -> Any:
        raise inference.refuse_change()

    async def _model_infer(self, request: Any) -> Any:
        running = await open_inference(self._state, request)
        outputs = await inference.infer(self._state, running)
        return write_response(self._state.model.name, request.id, outputs)


def _message(name: str, value: dict[str, Any]) -> Any:
    """The message that says `value`, as far as it has words for it."""
    return ParseDict(value, MESSAGES[name](), ignore_unknown_fields=True)


async def open_inference(state: AppState, request: Any) -> Inference:
    """Check and encode a ModelInferRequest. Raises ApiError."""
    inference.check_model(state, request.model_name, request.model_version)
    num_bytes, vocab_size = request.ByteSize(), state.model.tokenizer.vocab_size
    asked = await off_loop(num_bytes, lambda: read_asked(request, vocab_size=vocab_size))
    return await inference.prepare(state, asked, num_bytes)


class StreamInfer:
    """One call of ModelStreamInfer: requests come and responses go, each naming its request."""

    def __init__(self, state: AppState, call: Call) -> None:
        self._state = state
        self._call = call
        self._free = trio.Semaphore(MAX_RUNNING)

    async def run(self) -> None:
        """Answer all requests. Raises RpcError or ServerEnds when no more can be read."""
        async with trio.open_nursery() as running:
            failure = await self._read(running)
            if isinstance(failure, RpcError):
                running.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _read(self, running: trio.Nursery) -> Exception | None:
        """Start what comes until nothing follows; what went wrong, if anything did."""
        try:
            while (message := await self._call.receive()) is not None:
                await self._free.acquire()
                running.start_soon(self._answer, message)
        except (RpcError, ServerEnds) as error:
            return error
        return None

    async def _answer(self, message: bytes) -> None:
        """Answer one request; what is wrong with it concerns no other."""
        request_id = ""
        try:
            request = read_request(message)
            request_id = request.id
            running = await open_inference(self._state, request)
            if running.asked.stream:
                await self._stream(running, request_id)
            else:
                outputs = await inference.infer(self._state, running)
                Responses(self._state, self._call, running, request_id).send_whole(outputs)
        except ApiError as error:
            self._call.send(_refusal(self._state.model.name, request_id, error.message))
        except Exception as error:
            log_failure(logger, "a request of ModelStreamInfer failed", error)
            self._call.send(_refusal(self._state.model.name, request_id, FAILED))
        finally:
            self._free.release()

    async def _stream(self, running: Inference, request_id: str) -> None:
        responses = Responses(self._state, self._call, running, request_id)
        completion = Completion(running.prepared, responses, self._state.meter)
        with running.timing.answering(), self._state.track(completion):
            async with completion.open(self._state.engine):
                await responses.run()


def _refusal(model: str, request_id: str, message: str) -> bytes:
    """The response to a request that cannot be answered, or not to its end."""
    response = write_response(model, request_id, ())
    mark_final(response, final=True)
    reply = MESSAGES["ModelStreamInferResponse"](error_message=message, infer_response=response)
    return bytes(reply.SerializeToString())


class Responses:
    """The responses to one request of a stream, sent by the engine's fan-out as they are made."""

    def __init__(self, state: AppState, call: Call, inference: Inference, request_id: str) -> None:
        self._model = state.model.name
        self._call = call
        self._inference = inference
        self._id = request_id
        self._unfinished = len(inference.prepared.decoders)
        self._ended = False
        self._attention = trio.Event()

    def on_text(self, choice: int, text: str) -> None:
        self.on_delta(choice, Delta(text))

    def on_delta(self, choice: int, delta: Delta) -> None:
        self._unfinished -= delta.finish is not None
        outputs = self._inference.part(choice, delta)
        self._send(outputs, final=not self._unfinished)

    def on_end(self, error: ApiError | None, usage: Usage) -> None:
        if error is not None:
            self._inference.timing.failed = True
            self._call.send(_refusal(self._model, self._id, error.message))
        else:
            self._inference.timing.mark_answered()
            if self._unfinished:  # ended from outside
                self._send((), final=True)
        self._ended = True
        self._attention.set()

    def send_whole(self, outputs: Sequence[Tensor]) -> None:
        """Send the only response."""
        self._send(outputs, final=True)

    def _send(self, outputs: Sequence[Tensor], *, final: bool) -> None:
        response = write_response(self._model, self._id, outputs)
        mark_final(response, final=final)
        reply = MESSAGES["ModelStreamInferResponse"](infer_response=response)
        if not self._call.send(reply.SerializeToString()):
            self._attention.set()

    async def run(self) -> None:
        """Wait for the end; meanwhile see to a client that is slow to read."""
        while not self._ended or self._call.unsent:
            if self._call.unsent:
                await self._call.flush()
            else:
                self._attention = trio.Event()
                await self._attention.wait()
