"""The same prompts over gRPC, with Triton's own client in threads."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from kttrio.client import ClientError, StatusError
from tools.soak.questions import Question

SECONDS = 60.0
NAME = "ModelStreamInfer"


def can_ask(question: Question) -> bool:
    return bool(question.prompt)


def ask(address: str, model: str, question: Question, patience: int | None) -> str:
    """The text of one answer; with `patience`, of so many pieces, whereupon the client leaves.
    Blocking. Raises ClientError."""
    try:
        with InferenceServerClient(address) as client:
            return "".join(_pieces(client, model, question, patience))
    except InferenceServerException as error:
        if error.status() == "StatusCode.RESOURCE_EXHAUSTED":
            raise StatusError(429, str(error), {}) from error
        raise ClientError(str(error)) from error


def _pieces(
    client: InferenceServerClient, model: str, question: Question, patience: int | None
) -> Iterator[str]:
    with _stream(client) as next_result:
        client.async_stream_infer(model, _inputs(question))
        final, num_pieces = False, 0
        while not final and num_pieces != patience:
            result = next_result()
            yield result.as_numpy("text_output")[0].decode()
            num_pieces += 1
            final = result.get_response().parameters["triton_final_response"].bool_param


@contextmanager
def _stream(client: InferenceServerClient) -> Iterator[Callable[[], Any]]:
    came: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.start_stream(lambda result, error: came.put(error or result))

    def next_result() -> Any:
        try:
            one = came.get(timeout=SECONDS)
        except queue.Empty:
            raise ClientError(f"no answer over gRPC for {SECONDS:g} s") from None
        if isinstance(one, Exception):
            raise one
        return one

    try:
        yield next_result
    finally:
        client.stop_stream(cancel_requests=True)


def _inputs(question: Question) -> list[InferInput]:
    given = {"text_input": question.prompt, "max_tokens": question.max_tokens, "temperature": 0}
    return [
        tensor(name, value) for name, value in {**given, "stream": True, **question.fields}.items()
    ]


def tensor(name: str, value: object) -> InferInput:
    """A string, a truth or a number as an input of one element."""
    if isinstance(value, str):
        array, datatype = np.array([value.encode()], dtype=np.object_), "BYTES"
    elif isinstance(value, bool):
        array, datatype = np.array([value]), "BOOL"
    else:
        array, datatype = np.array([value], dtype=np.int32), "INT32"
    filled = InferInput(name, [1], datatype)
    filled.set_data_from_numpy(array)
    return filled
