"""Triton's routes, and KServe's, version 2: health, what the model is, infer and generate.

Bodies are read in request.py and answers written in response.py; what is the same
over gRPC is in inference.py.
"""

from __future__ import annotations

from typing import Any

from quart import Blueprint, Response, request
from quart_trio.wrappers import TrioResponse
from werkzeug.datastructures import Headers
from werkzeug.routing import PathConverter

from kttrio.server import sse
from kttrio.server.answering import stream
from kttrio.server.bodies import read_bytes
from kttrio.server.encodings import encoded, encoding_of
from kttrio.server.errors import ApiError
from kttrio.server.off_loop import off_loop
from kttrio.server.replies import LiveResponse, json_response
from kttrio.server.state import AppState
from kttrio.server.triton import inference
from kttrio.server.triton import operations as triton_operations
from kttrio.server.triton.inference import Inference, check_model, infer, prepare
from kttrio.server.triton.request import (
    HEADER_LENGTH,
    read_generate,
    read_index,
    read_infer,
)
from kttrio.server.triton.response import (
    GenerateStream,
    generate_fields,
    head_fields,
    infer_body,
)

OPERATIONS = triton_operations.OPERATIONS
MODEL = "/models/<model:name>"
VERSIONED = f"{MODEL}/versions/<version>"
ACTIONS = ("infer", "generate", "generate_stream", "ready", "config", "stats")
EVENT_HEADERS = Headers([(name.decode(), value.decode()) for name, value in sse.HEADERS])


class ModelName(PathConverter):
    """A model's name in a path, slashes and all, without what is asked of the model: else GET
    .../infer would look for a model of that name, where 405 is the answer."""

    regex = "[^/].*?" + "".join(f"(?<!/{word})" for word in (*ACTIONS, "trace/setting"))


def blueprint(state: AppState) -> Blueprint:
    """The routes over one server's state."""
    routes = Blueprint("triton", __name__, url_prefix="/v2")
    routes.record_once(lambda setup: setup.app.url_map.converters.update(model=ModelName))
    _add_health(routes, state)
    _add_descriptions(routes, state)
    _add_repository(routes, state)
    _add_inference(routes, state)
    return routes


def _add_health(routes: Blueprint, state: AppState) -> None:
    @routes.get("/health/live")
    async def live() -> Response:
        return _nothing()

    @routes.get("/health/ready")
    async def ready() -> Response:
        return _readiness(state)

    @routes.get(f"{MODEL}/ready")
    @routes.get(f"{VERSIONED}/ready")
    async def model_ready(name: str, version: str = "") -> Response:
        try:
            check_model(state, name, version)
        except ApiError as error:
            raise ApiError(400, error.message) from None
        return _readiness(state)


def _nothing() -> Response:
    return TrioResponse(b"", content_type="application/json")


def _readiness(state: AppState) -> Response:
    """Whoever is not ready answers 400 in this protocol."""
    if (trouble := state.trouble) is not None:
        raise ApiError(400, f"This server is not ready: {trouble}.")
    return _nothing()


def _add_descriptions(routes: Blueprint, state: AppState) -> None:
    @routes.get("", strict_slashes=False)
    async def server() -> Response:
        return json_response(inference.server_metadata())

    @routes.get(MODEL)
    @routes.get(VERSIONED)
    async def model(name: str, version: str = "") -> Response:
        check_model(state, name, version)
        return json_response(inference.model_metadata(state))

    @routes.get(f"{MODEL}/config")
    @routes.get(f"{VERSIONED}/config")
    async def config(name: str, version: str = "") -> Response:
        check_model(state, name, version)
        return json_response(inference.model_config(state))

    @routes.get(f"{MODEL}/stats")
    @routes.get(f"{VERSIONED}/stats")
    @routes.get("/models/stats")
    async def stats(name: str | None = None, version: str = "") -> Response:
        if name is not None:
            check_model(state, name, version)
        return json_response({"model_stats": inference.model_statistics(state)})


def _add_repository(routes: Blueprint, state: AppState) -> None:
    @routes.post("/repository/index")
    async def index() -> Response:
        asked, _ = await read_bytes(read_index)
        return json_response(inference.repository_index(state, only_ready=asked.ready))

    @routes.post("/repository/models/<path:name>/load")
    @routes.post("/repository/models/<path:name>/unload")
    async def change(name: str) -> Response:
        raise inference.refuse_change()


def _add_inference(routes: Blueprint, state: AppState) -> None:
    @routes.post(f"{MODEL}/infer")
    @routes.post(f"{VERSIONED}/infer")
    async def infer_model(name: str, version: str = "") -> Response:
        check_model(state, name, version)
        return await _infer(state)

    @routes.post(f"{MODEL}/generate")
    @routes.post(f"{VERSIONED}/generate")
    async def generate(name: str, version: str = "") -> Response:
        check_model(state, name, version)
        head, running = await _open_generate(state)
        return json_response(generate_fields(head, await infer(state, running)))

    @routes.post(f"{MODEL}/generate_stream")
    @routes.post(f"{VERSIONED}/generate_stream")
    async def generate_stream(name: str, version: str = "") -> Response:
        check_model(state, name, version)
        head, running = await _open_generate(state)
        if running.asked.stream:
            return _stream(state, head, running)
        event = sse.event(generate_fields(head, await infer(state, running)))
        return TrioResponse(event, headers=EVENT_HEADERS)


async def _open_generate(state: AppState) -> tuple[dict[str, Any], Inference]:
    vocab_size = state.model.tokenizer.vocab_size
    asked, num_bytes = await read_bytes(lambda body: read_generate(body, vocab_size=vocab_size))
    head = head_fields(state.model.name, asked.id)
    return head, await prepare(state, asked.asked, num_bytes)


async def _infer(state: AppState) -> Response:
    vocab_size, header = state.model.tokenizer.vocab_size, request.headers.get(HEADER_LENGTH)
    asked, num_bytes = await read_bytes(
        lambda body: read_infer(body, header, vocab_size=vocab_size)
    )
    outputs = await infer(state, await prepare(state, asked.asked, num_bytes))
    head = head_fields(state.model.name, asked.id)
    body, json_length = infer_body(head, outputs, asked.binary)
    if json_length is None:
        response = TrioResponse(body, content_type="application/json")
    else:
        response = TrioResponse(body, content_type="application/octet-stream")
        response.headers[HEADER_LENGTH] = str(json_length)
    return await _encoded(response, body)


async def _encoded(response: Response, body: bytes) -> Response:
    """The response, smaller where its client can read it so."""
    encoding = encoding_of(request.headers.get("Accept-Encoding", ""))
    if encoding:
        packed = await off_loop(len(body), lambda: encoded(body, encoding), patient=True)
        response.set_data(packed)
        response.headers["Content-Encoding"] = encoding
    response.headers["Vary"] = "Accept-Encoding"
    return response


def _stream(state: AppState, head: dict[str, Any], running: Inference) -> LiveResponse:
    """Events as they come. An error before the first of them is an HTTP error."""
    response = stream(
        state,
        running.prepared,
        lambda events: GenerateStream(head, running, events),
        patient=True,
    )

    async def run(scope: Any, send: sse.Send) -> None:
        with running.timing.answering():
            await response.run(scope, send)

    return LiveResponse(run)
