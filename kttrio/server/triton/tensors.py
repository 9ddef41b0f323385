"""Named tensors as KServe v2 knows them: datatypes, shapes, and elements as JSON or as raw bytes.

Without numpy: what is served are prompts and a handful of numbers. Which tensors a model takes is
not known here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

from kttrio.server.schema.kinds import refuse, whole, word

BYTES = "BYTES"
CODES: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "?",
        "UINT8": "B",
        "UINT16": "H",
        "UINT32": "I",
        "UINT64": "Q",
        "INT8": "b",
        "INT16": "h",
        "INT32": "i",
        "INT64": "q",
        "FP16": "e",
        "FP32": "f",
        "FP64": "d",
    }
)
"""How `struct` spells an element, for datatypes whose elements have all the same length."""
DATATYPES = (*CODES, BYTES)
MAX_DIMENSIONS = 16
LENGTH = struct.Struct("<I")
"""Before each element of BYTES."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """`values` are flat, in row-major order: bytes for BYTES, else bool, int or float."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: tuple[Any, ...]

    @property
    def texts(self) -> tuple[Any, ...]:
        """The elements as JSON has them: BYTES as text, whose half characters are replaced."""
        if self.datatype != BYTES:
            return self.values
        return tuple(value.decode(errors="replace") for value in self.values)


def vector(name: str, datatype: str, values: Sequence[Any]) -> Tensor:
    """A tensor of one dimension."""
    return Tensor(name, datatype, (len(values),), tuple(values))


def pack(tensor: Tensor) -> bytes:
    """The elements as they lie in a binary body: little-endian, each of BYTES after its length."""
    if tensor.datatype != BYTES:
        return struct.pack(f"<{len(tensor.values)}{CODES[tensor.datatype]}", *tensor.values)
    return b"".join(LENGTH.pack(len(value)) + value for value in tensor.values)


def unpack(name: str, datatype: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    """The tensor of elements that lie in `data` as `pack` lays them. Raises BadRequestError."""
    count = prod(shape)
    if datatype == BYTES:
        return Tensor(name, datatype, shape, tuple(_strings(name, count, data)))
    code = CODES[datatype]
    num_bytes = count * struct.calcsize(code)
    if len(data) != num_bytes:
        refuse(name, f"has {len(data)} bytes of data, but its shape and datatype mean {num_bytes}")
    return Tensor(name, datatype, shape, struct.unpack(f"<{count}{code}", data))


def _strings(name: str, count: int, data: bytes) -> Iterator[bytes]:
    offset = 0
    for _ in range(count):
        if offset + LENGTH.size > len(data):
            refuse(name, f"has fewer than the {count} elements of its shape")
        (length,) = LENGTH.unpack_from(data, offset)
        offset += LENGTH.size + length
        if offset > len(data):
            refuse(name, f"has an element of {length} bytes that goes beyond its data")
        yield data[offset - length : offset]
    if offset != len(data):
        refuse(name, f"has {len(data) - offset} bytes more than the {count} elements of its shape")


def from_json(name: str, datatype: str, shape: tuple[int, ...], data: list[Any]) -> Tensor:
    """The tensor of elements in a JSON array, flat or nested. Raises BadRequestError."""
    values = tuple(_element(name, datatype, value) for value in flat(data))
    if len(values) != prod(shape):
        refuse(name, f"has {len(values)} elements, but its shape means {prod(shape)}")
    return Tensor(name, datatype, shape, values)


def flat(data: list[Any]) -> Iterator[Any]:
    """The elements of nested arrays, in order, however deep they are."""
    waiting = [iter(data)]
    while waiting:
        for value in waiting[-1]:
            if isinstance(value, list):
                waiting.append(iter(value))
                break
            yield value
        else:
            waiting.pop()


def _element(name: str, datatype: str, value: Any) -> Any:
    if datatype == BYTES:
        if not isinstance(value, str):
            refuse(name, f"must hold strings, as {BYTES} has them, not {word(value)}")
        return value.encode(errors="replace")
    if datatype == "BOOL":
        if not isinstance(value, bool):
            refuse(name, f"must hold booleans, as BOOL has them, not {word(value)}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(name, f"must hold numbers, as {datatype} has them, not {word(value)}")
    return _number(name, datatype, value)


def _number(name: str, datatype: str, value: float) -> float:
    """As the datatype holds it, so that JSON and raw bytes mean the same."""
    code = CODES[datatype]
    number = value if datatype.startswith("FP") else whole(value)
    try:
        (held,) = struct.unpack(f"<{code}", struct.pack(f"<{code}", number))
    except (struct.error, OverflowError):
        refuse(name, f"has an element that is no {datatype}")
    return float(held) if isinstance(held, float) else int(held)
