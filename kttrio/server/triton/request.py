"""What clients of Triton and KServe v2 send over HTTP: bodies of infer, as JSON with or without
binary tensors behind it, and of generate.

Which tensors the model takes is known to inputs.py.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields, make_dataclass
from typing import Any

from kttrio.server.bodies import parse_object
from kttrio.server.errors import BadRequestError
from kttrio.server.schema.kinds import (
    Boolean,
    Integer,
    Many,
    Object,
    OneOf,
    Text,
    check_type,
    refuse,
)
from kttrio.server.schema.records import Checked, Nested, Stance, given, ignored, read, refused
from kttrio.server.triton.inference_request import Asked, ask, ask_tensors
from kttrio.server.triton.inputs import Inputs
from kttrio.server.triton.loose import Loose
from kttrio.server.triton.tensors import BYTES, DATATYPES, MAX_DIMENSIONS, Tensor, from_json, unpack

HEADER_LENGTH = "Inference-Header-Content-Length"
NO_SHARING = "send the tensor's data: this server shares no memory with its clients"


class Array:
    """Any JSON array, as it is."""

    def read(self, value: Any, path: str) -> list[Any]:
        check_type(value, list, "an array", path)
        return list(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "array"}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputParameters:
    """What is said of one input beside its data."""

    binary_data_size: int | None = given(
        Integer(0), "bytes of its data, which follow the JSON in the order of the inputs"
    )
    shared_memory_region: None = refused(NO_SHARING)
    shared_memory_byte_size: None = refused(NO_SHARING)
    shared_memory_offset: None = refused(NO_SHARING)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferInput:
    """One input tensor."""

    name: str = given(Text(1), "of the input", required=True)
    shape: tuple[int, ...] = given(
        Many(Integer(0), most=MAX_DIMENSIONS), "its dimensions", required=True
    )
    datatype: str = given(OneOf(DATATYPES), "of its elements", required=True)
    data: list[Any] | None = given(Array(), "its elements in row-major order, flat or nested")
    parameters: InputParameters = given(
        Nested(InputParameters), "where else its data is", default=InputParameters()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputParameters:
    """How one output is written."""

    binary_data: bool | None = given(Boolean(), "behind the JSON, not in it")
    classification: None = refused("the model names no classes")
    shared_memory_region: None = refused(NO_SHARING)
    shared_memory_byte_size: None = refused(NO_SHARING)
    shared_memory_offset: None = refused(NO_SHARING)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedOutput:
    """One output that is asked for."""

    name: str = given(Text(1), "of the output", required=True)
    parameters: OutputParameters = given(
        Nested(OutputParameters), "how it is written", default=OutputParameters()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestParameters:
    """What is said of a whole request."""

    binary_data_output: bool = given(
        Boolean(), "all outputs behind the JSON, where they do not say otherwise", default=False
    )
    priority: None = ignored("requests are served in the order of their arrival")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexBody:
    """POST /v2/repository/index."""

    ready: bool = given(Boolean(), "only models that are ready", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferBody:
    """POST /v2/models/NAME/infer."""

    id: str | None = given(Text(), "a name for the request, which its answer repeats")
    inputs: tuple[InferInput, ...] = given(
        Many(Nested(InferInput), least=1), "the input tensors", required=True
    )
    outputs: tuple[RequestedOutput, ...] | None = given(
        Many(Nested(RequestedOutput)),
        "the outputs to write, in order; without it the text and what inputs ask for",
    )
    parameters: dict[str, Any] | None = given(
        Checked(RequestParameters), "those named here, and inputs by their names"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateBody:
    """POST /v2/models/NAME/generate and generate_stream: all but the inputs, by their names."""

    id: str | None = given(Text(), "a name for the request, which its answer repeats")
    parameters: dict[str, Any] | None = given(Object(), "more inputs by their names")


def _loosened(one: Field[Any]) -> tuple[str, Any, Any]:
    """A field of the same name, whose values may be spelled as clients of generate do."""
    told = one.metadata
    if told["stance"] is not Stance.DONE:
        return one.name, None, field(default=None, init=False, metadata=told)
    required: bool = told["required"]
    return one.name, Any, given(Loose(told["kind"]), told["help"], required=required)


WHOLE_GENERATE_BODY = make_dataclass(
    "WholeGenerateBody",
    map(_loosened, fields(Inputs)),
    bases=(GenerateBody,),
    kw_only=True,
    frozen=True,
)
"""The same with the inputs: what a client may send."""


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A body that was read."""

    asked: Asked
    id: str = ""
    binary: frozenset[str] = frozenset()
    """The outputs that are written behind the JSON."""


def read_index(body: bytes) -> IndexBody:
    """Read the body of the index, which may be missing. Raises BadRequestError."""
    return read(IndexBody, parse_object(body or b"{}", unique=True))


def read_generate(body: bytes, *, vocab_size: int) -> InferRequest:
    """Read the body of generate or generate_stream. Raises BadRequestError."""
    value = parse_object(body, unique=True)
    told: GenerateBody = read(WHOLE_GENERATE_BODY, value)
    inputs = {name: entry for name, entry in value.items() if name not in ("id", "parameters")}
    return InferRequest(ask(inputs, told.parameters or {}, vocab_size=vocab_size), told.id or "")


def read_infer(body: bytes, header_length: str | None, *, vocab_size: int) -> InferRequest:
    """Read the body of infer; `header_length` is what its header field says of the length of the
    JSON at its begin, if anything. Raises BadRequestError."""
    num_bytes = len(body) if header_length is None else _length(header_length, len(body))
    if header_length is not None and num_bytes == 0:
        return _read_raw(body, vocab_size)
    told = read(InferBody, parse_object(body[:num_bytes], unique=True))
    parameters = told.parameters or {}
    outputs = None if told.outputs is None else [one.name for one in told.outputs]
    asked = ask_tensors(
        _tensors(told.inputs, body[num_bytes:]), parameters, outputs=outputs, vocab_size=vocab_size
    )
    default = read(RequestParameters, parameters).binary_data_output
    wishes = {one.name: one.parameters.binary_data for one in told.outputs or ()}
    binary = [name for name in asked.outputs if _or(wishes.get(name), default)]
    return InferRequest(asked, told.id or "", frozenset(binary))


def _or(given: bool | None, default: bool) -> bool:
    return default if given is None else given


def _length(field: str, most: int) -> int:
    """What the header field says of the length of the JSON."""
    if not (field.isascii() and field.isdigit() and len(field) < 20 and int(field) <= most):
        raise BadRequestError(
            f"The header {HEADER_LENGTH} must be the length of the JSON at the begin of the body, "
            f"which has {most} bytes, or 0."
        )
    return int(field)


def _read_raw(body: bytes, vocab_size: int) -> InferRequest:
    """A body without JSON is the prompt, as it is."""
    prompt = Tensor("text_input", BYTES, (1,), (body,))
    asked = ask_tensors([prompt], {}, vocab_size=vocab_size)
    return InferRequest(asked, binary=frozenset(asked.outputs))


def _tensors(inputs: tuple[InferInput, ...], tail: bytes) -> list[Tensor]:
    """The inputs; those without `data` lie in `tail`, one behind the other."""
    tensors, rest = [], memoryview(tail)
    for one in inputs:
        size = one.parameters.binary_data_size
        if one.data is not None and size is None:
            tensors.append(from_json(one.name, one.datatype, one.shape, one.data))
        elif one.data is None and size is not None and size <= len(rest):
            tensors.append(unpack(one.name, one.datatype, one.shape, bytes(rest[:size])))
            rest = rest[size:]
        else:
            refuse(
                one.name,
                "must have either 'data' or the parameter 'binary_data_size', and as many bytes "
                "behind the JSON",
            )
    if rest:
        raise BadRequestError(f"The body has {len(rest)} bytes more than its inputs.")
    return tensors
