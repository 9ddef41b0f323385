"""Inference requests and responses between protobuf's messages and tensors.

Which tensors the model takes is known to triton/inputs.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from google.protobuf.message import DecodeError

from kttrio.server.errors import BadRequestError
from kttrio.server.grpc.messages import MESSAGES
from kttrio.server.schema.kinds import refuse
from kttrio.server.triton.inference import VERSION
from kttrio.server.triton.inference_request import Asked, ask_tensors
from kttrio.server.triton.tensors import DATATYPES, MAX_DIMENSIONS, Tensor, pack, unpack

FINAL = "triton_final_response"
"""The parameter of a response that tells whether another one follows."""
NOT_OFFERED = frozenset(
    {
        "classification",
        "shared_memory_byte_size",
        "shared_memory_offset",
        "shared_memory_region",
    }
)
"""Parameters of tensors: the model names no classes, and no memory is shared with clients."""
CONTENTS: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool_contents",
        "UINT8": "uint_contents",
        "UINT16": "uint_contents",
        "UINT32": "uint_contents",
        "UINT64": "uint64_contents",
        "INT8": "int_contents",
        "INT16": "int_contents",
        "INT32": "int_contents",
        "INT64": "int64_contents",
        "FP32": "fp32_contents",
        "FP64": "fp64_contents",
        "BYTES": "bytes_contents",
    }
)
"""Where the elements of a datatype stand in a message; those of FP16 come as raw bytes only."""


def read_request(message: bytes) -> Any:
    """A ModelInferRequest. Raises BadRequestError."""
    return read_message("ModelInferRequest", message)


def read_message(name: str, message: bytes) -> Any:
    """The message of this type in `message`. Raises BadRequestError."""
    try:
        return MESSAGES[name].FromString(message)
    except DecodeError as error:
        raise BadRequestError(f"The message is no {name}: {error}.") from None


def read_asked(request: Any, *, vocab_size: int) -> Asked:
    """What a ModelInferRequest asks for. Raises BadRequestError."""
    for tensor in (*request.inputs, *request.outputs):
        if unserved := NOT_OFFERED.intersection(tensor.parameters):
            refuse(tensor.name[:200], f"must come without '{min(unserved)}', not offered here")
    outputs = [output.name for output in request.outputs]
    return ask_tensors(
        list(_inputs(request)),
        _parameters(request.parameters),
        outputs=outputs or None,
        vocab_size=vocab_size,
    )


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: getattr(value, field)
        for name, value in parameters.items()
        if (field := value.WhichOneof("parameter_choice"))
    }


def _inputs(request: Any) -> Iterator[Tensor]:
    """The tensors, whose elements stand either all in the message's tail or all in themselves."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        message = f"There are {len(request.inputs)} inputs, but {len(raw)} 'raw_input_contents'."
        raise BadRequestError(message)
    for i, tensor in enumerate(request.inputs):
        name, datatype, shape = tensor.name[:200], tensor.datatype, tuple(tensor.shape)
        if datatype not in DATATYPES:
            refuse(name, f"must be one of {', '.join(DATATYPES)}")
        if min(shape, default=0) < 0 or len(shape) > MAX_DIMENSIONS:
            refuse(name, f"must have a shape of at most {MAX_DIMENSIONS} numbers from 0 on")
        data = raw[i] if raw else _packed(tensor)
        yield unpack(name, datatype, shape, data)


def _packed(tensor: Any) -> bytes:
    """The elements that stand in the tensor itself, as they would lie in the tail."""
    name, datatype = tensor.name[:200], tensor.datatype
    if (field := CONTENTS.get(datatype)) is None:
        refuse(name, f"must come in 'raw_input_contents', as all {datatype} do")
    values = tuple(getattr(tensor.contents, field))
    try:
        return pack(Tensor(name, datatype, (len(values),), values))
    except struct.error:
        refuse(name, f"has an element that is no {datatype}")


def write_response(model: str, request_id: str, outputs: Sequence[Tensor]) -> Any:
    """A ModelInferResponse."""
    response = MESSAGES["ModelInferResponse"](
        model_name=model, model_version=VERSION, id=request_id
    )
    for output in outputs:
        response.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        response.raw_output_contents.append(pack(output))
    return response


def mark_final(response: Any, *, final: bool) -> None:
    """Say whether it is the last response to its request."""
    response.parameters[FINAL].bool_param = final
