"""How clients of Triton and KServe v2 are answered over HTTP: responses of infer and generate, the
events of generate_stream, and errors.

Which tensors an answer has is known to inference.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kttrio.server import sse
from kttrio.server.completion import Usage
from kttrio.server.decoding import Delta
from kttrio.server.errors import ApiError
from kttrio.server.triton.inference import VERSION, Inference
from kttrio.server.triton.tensors import Tensor, pack

HOLE = "%text%"


def error_body(error: ApiError) -> dict[str, Any]:
    """Triton's error object, also the content of an error event in a stream."""
    return {"error": error.message}


def head_fields(model: str, request_id: str) -> dict[str, Any]:
    """What every response of a request repeats."""
    named = {"id": request_id} if request_id else {}
    return {**named, "model_name": model, "model_version": VERSION}


def generate_fields(head: dict[str, Any], outputs: Sequence[Tensor]) -> dict[str, Any]:
    """One response of generate: a tensor of one element is that element."""
    return {**head, **{output.name: _alone(output) for output in outputs}}


def _alone(output: Tensor) -> Any:
    values = output.texts
    return values[0] if len(values) == 1 else list(values)


def infer_body(
    head: dict[str, Any], outputs: Sequence[Tensor], binary: frozenset[str]
) -> tuple[bytes, int | None]:
    """The response of infer, and the length of its JSON where outputs lie behind it."""
    behind = {one.name: pack(one) for one in outputs if one.name in binary}
    told = [_output(one, behind.get(one.name)) for one in outputs]
    text = json.dumps({**head, "outputs": told}, ensure_ascii=False, separators=(",", ":"))
    start = text.encode()
    return b"".join([start, *behind.values()]), len(start) if behind else None


def _output(output: Tensor, behind: bytes | None) -> dict[str, Any]:
    told = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
    if behind is None:
        return {**told, "data": list(output.texts)}
    return {**told, "parameters": {"binary_data_size": len(behind)}}


class GenerateStream:
    """Writes an answer as events, one for each of its pieces. No [DONE] follows."""

    def __init__(self, head: dict[str, Any], inference: Inference, events: sse.EventStream) -> None:
        self._head = head
        self._inference = inference
        self._events = events
        self._text: sse.EventTemplate | None = None
        if inference.is_plain:
            self._text = sse.EventTemplate({**head, "text_output": HOLE}, HOLE)

    def on_text(self, choice: int, text: str) -> None:
        if self._text is None:
            self.on_delta(choice, Delta(text))
        else:
            self._events.put(self._text.fill(text))

    def on_delta(self, choice: int, delta: Delta) -> None:
        outputs = self._inference.part(choice, delta)
        self._events.put(sse.event(generate_fields(self._head, outputs)))

    def on_end(self, error: ApiError | None, usage: Usage) -> None:
        if error is None:
            self._inference.timing.mark_answered()
            self._events.end()
        else:
            self._inference.timing.failed = True
            self._events.fail(error, sse.event(error_body(error)))
