"""The wall to the C++ expert library: the only file that opens it.

Finds the library, checks dtype, shape and contiguity of what is handed over, and turns error codes
into NativeError. Never imports torch: anything with data_ptr, dtype, shape and device will do.
ctypes lets other Python threads run while a forward does.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_uint64, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

ABI_VERSION = 1
SCALE_BLOCK = 128  # weights along each side of an fp8 scale's square

_ISAS = {"auto": 0, "avx2": 1, "avx512": 2, "amx": 3}
_FORMATS = {"bf16": 0, "fp8": 1}
_DTYPES = {"float32": 0, "bfloat16": 1}
_WEIGHT_DTYPES = {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}
_ELEMENT_BYTES = {"bf16": 2, "fp8": 1}

_INT32_P = POINTER(c_int32)
_HANDLE_P = POINTER(c_void_p)

# Result and arguments of every function of kttrio.h, in the header's order and types.
PROTOTYPES: dict[str, tuple[type, tuple[type, ...]]] = {
    "ktt_abi_version": (c_int32, ()),
    "ktt_last_error": (c_char_p, ()),
    "ktt_isa_granted": (c_int32, (c_int32,)),
    "ktt_pool_create": (c_int32, (c_int32, c_int32, _INT32_P, c_int32, _HANDLE_P)),
    "ktt_pool_destroy": (c_int32, (c_void_p,)),
    "ktt_pool_info": (c_int32, (c_void_p, _INT32_P, _INT32_P, _INT32_P)),
    "ktt_layer_create": (c_int32, (c_void_p, *(c_int32,) * 7, _HANDLE_P)),
    "ktt_layer_destroy": (c_int32, (c_void_p,)),
    "ktt_layer_set_expert": (
        c_int32,
        (c_void_p, c_int32, *(c_void_p,) * 3, c_uint64, *(POINTER(c_float),) * 3, c_uint64),
    ),
    "ktt_layer_forward": (
        c_int32,
        (c_void_p, c_int32, c_int32, _INT32_P, POINTER(c_float), c_int32, c_void_p, c_void_p),
    ),
    "ktt_layer_bytes": (c_int32, (c_void_p, POINTER(c_uint64))),
}

BUILD_COMMAND = "cmake -S . -B build && cmake --build build -j2"


class NativeError(RuntimeError):
    """The expert library is absent or refused a call; the message says why and what to do."""


class Device(Protocol):
    """Where a tensor lives."""

    @property
    def type(self) -> str: ...


class Tensor(Protocol):
    """What is read of a tensor; torch's has it all."""

    @property
    def dtype(self) -> object: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def device(self) -> Device: ...
    def data_ptr(self) -> int: ...
    def is_contiguous(self) -> bool: ...


def library_candidates() -> list[Path]:
    """Built libraries, newest first: in the package (wheel), in build*/ beside it (source tree)."""
    package = Path(__file__).resolve().parent
    found = [package / "libkttrio.so", *package.parent.glob("build*/libkttrio.so")]
    return sorted(
        (path for path in found if path.is_file()),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )


def open_library(path: Path) -> ctypes.CDLL:
    """Opens one library file and declares its functions; NativeError if it is not of our age."""
    try:
        library = ctypes.CDLL(str(path))
        version = library.ktt_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeError(
            f"cannot use the expert library {path}: {error}; build it again: {BUILD_COMMAND}"
        ) from error
    if version != ABI_VERSION:
        raise NativeError(
            f"the expert library {path} speaks ABI version {version}, this package {ABI_VERSION}; "
            f"build it again: {BUILD_COMMAND}"
        )
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.cache
def _library() -> ctypes.CDLL:
    candidates = library_candidates()
    if not candidates:
        raise NativeError(
            "the expert library libkttrio.so is neither in the package nor in a build*/ folder "
            f"beside it; build it in the source tree: {BUILD_COMMAND}"
        )
    return open_library(candidates[0])


def _call(name: str, *arguments: object) -> None:
    library = _library()
    if getattr(library, name)(*arguments) != 0:
        raise NativeError(f"{library.ktt_last_error().decode(errors='replace')} ({name})")


def abi_version() -> int:
    """The version of the wall that the library in use speaks."""
    return int(_library().ktt_abi_version())


def isa_available() -> tuple[str, ...]:
    """Instruction sets that processor and operating system grant, best first."""
    library = _library()
    return tuple(name for name in ("amx", "avx512", "avx2") if library.ktt_isa_granted(_ISAS[name]))


def _lookup(what: str, value: str, choices: dict[str, int]) -> int:
    if value not in choices:
        raise NativeError(f"{what} is {value!r}, but must be one of {', '.join(choices)}")
    return choices[value]


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _address(name: str, tensor: Tensor, dtype: str, shape: tuple[int, ...]) -> int:
    """The tensor's address, once it is known to be exactly what the library will read there."""
    if _dtype_name(tensor) != dtype:
        raise NativeError(f"{name} is {_dtype_name(tensor)}, but must be {dtype}")
    if tuple(tensor.shape) != shape:
        raise NativeError(f"{name} has shape {tuple(tensor.shape)}, but must have {shape}")
    if tensor.device.type != "cpu":
        raise NativeError(f"{name} is on {tensor.device.type}; move it to the CPU first")
    if not tensor.is_contiguous():
        raise NativeError(f"{name} is not contiguous; pass {name}.contiguous()")
    return tensor.data_ptr()


def _floats(address: int | None) -> ctypes._Pointer[c_float] | None:
    return None if address is None else ctypes.cast(address, POINTER(c_float))


class Pool:
    """Worker threads, and the kernels they run; shared by all layers.

    `threads` counts the calling thread, default: the cores this process may use. The pool has one
    part for each of `nodes` (NUMA nodes; one may come twice), or `parts` parts dealt over the NUMA
    nodes, default: one for each node. Experts are cut along their intermediate size over the parts.
    """

    def __init__(
        self,
        *,
        threads: int | None = None,
        nodes: Sequence[int] | None = None,
        parts: int | None = None,
        isa: str = "auto",
    ) -> None:
        self._handle = c_void_p()  # first, so that close() works after any error below
        if threads is not None and threads < 1:
            raise NativeError(f"threads is {threads}, but must be at least 1")
        if parts is not None and parts < 1:
            raise NativeError(f"parts is {parts}, but must be at least 1")
        if nodes and parts is not None and parts != len(nodes):
            raise NativeError(f"parts is {parts}, but {len(nodes)} nodes are named")
        node_array = (c_int32 * len(nodes))(*nodes) if nodes else None
        _call(
            "ktt_pool_create",
            _lookup("isa", isa, _ISAS),
            threads or 0,
            node_array,
            len(nodes) if nodes else parts or 0,
            ctypes.byref(self._handle),
        )
        chosen, num_threads, num_parts = c_int32(), c_int32(), c_int32()
        _call(
            "ktt_pool_info",
            self._handle,
            ctypes.byref(chosen),
            ctypes.byref(num_threads),
            ctypes.byref(num_parts),
        )
        self.isa = next(name for name, value in _ISAS.items() if value == chosen.value)
        self.num_threads = num_threads.value
        self.num_parts = num_parts.value

    @property
    def handle(self) -> c_void_p:
        """The library's own handle; an error once the pool is closed."""
        if not self._handle:
            raise NativeError("the pool is closed")
        return self._handle

    def close(self) -> None:
        """Gives the pool up; its threads end with its last layer. Twice is fine."""
        handle, self._handle = self._handle, c_void_p()
        if handle:
            _call("ktt_pool_destroy", handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


class ExpertLayer:
    """One MoE layer's routed experts, packed in the library's memory.

    `activation` says what the matrix products multiply: "float32" is exact, "bfloat16" rounds
    activations and is fast. Sums are fp32 in both. hidden_size and intermediate_size are multiples
    of 32. A call may bring more than `max_tokens` tokens; it then runs in slices of that size.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        weight_format: Literal["bf16", "fp8"],
        activation: Literal["float32", "bfloat16"],
        max_tokens: int,
        max_top_k: int,
    ) -> None:
        self._handle = c_void_p()
        _call(
            "ktt_layer_create",
            pool.handle,
            num_experts,
            hidden_size,
            intermediate_size,
            _lookup("weight_format", weight_format, _FORMATS),
            _lookup("activation", activation, _DTYPES),
            max_tokens,
            max_top_k,
            ctypes.byref(self._handle),
        )
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.weight_format = weight_format
        self.max_tokens = max_tokens

    @property
    def handle(self) -> c_void_p:
        """The library's own handle; an error once the layer is closed."""
        if not self._handle:
            raise NativeError("the layer is closed")
        return self._handle

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights and scales of the experts set so far."""
        num_bytes = c_uint64()
        _call("ktt_layer_bytes", self.handle, ctypes.byref(num_bytes))
        return num_bytes.value

    def set_expert(
        self,
        expert: int,
        *,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        gate_scale: Tensor | None = None,
        up_scale: Tensor | None = None,
        down_scale: Tensor | None = None,
    ) -> None:
        """Copies one expert's weights: gate and up [inter, hidden], down [hidden, inter].

        bfloat16, or float8_e4m3fn with fp32 scales [ceil(out / 128), ceil(in / 128)]; an fp8 NaN
        is refused. May be called again, also between forwards.
        """
        wide = (self.intermediate_size, self.hidden_size)
        tall = (self.hidden_size, self.intermediate_size)
        dtype = _WEIGHT_DTYPES[self.weight_format]
        scales = [
            None if scale is None else _floats(self._scale_address(name, scale, shape))
            for name, scale, shape in (
                ("gate_scale", gate_scale, wide),
                ("up_scale", up_scale, wide),
                ("down_scale", down_scale, tall),
            )
        ]
        is_scaled = any(scale is not None for scale in scales)
        _call(
            "ktt_layer_set_expert",
            self.handle,
            expert,
            _address("gate", gate, dtype, wide),
            _address("up", up, dtype, wide),
            _address("down", down, dtype, tall),
            wide[0] * wide[1] * _ELEMENT_BYTES[self.weight_format],
            *scales,
            _num_blocks(wide[0]) * _num_blocks(wide[1]) if is_scaled else 0,
        )

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        """out[t] = sum over k of weights[t, k] * expert ids[t, k] of x[t]; id -1 is skipped.

        x and out [tokens, hidden], both fp32 or both bfloat16; ids int32 and weights fp32
        [tokens, top_k]. Blocks until done. A token's result never depends on the others.
        """
        num_tokens, top_k = _pair_of_sizes("ids", ids)
        dtype = _dtype_name(x)
        _lookup("dtype of x", dtype, _DTYPES)
        size = (num_tokens, self.hidden_size)
        x_at = _address("x", x, dtype, size)
        out_at = _address("out", out, dtype, size)
        ids_at = _address("ids", ids, "int32", (num_tokens, top_k))
        weights_at = _address("weights", weights, "float32", (num_tokens, top_k))
        row_bytes = self.hidden_size * (4 if dtype == "float32" else 2)
        for begin in range(0, num_tokens, self.max_tokens):
            _call(
                "ktt_layer_forward",
                self.handle,
                min(self.max_tokens, num_tokens - begin),
                top_k,
                ctypes.cast(ids_at + begin * top_k * 4, _INT32_P),
                _floats(weights_at + begin * top_k * 4),
                _DTYPES[dtype],
                x_at + begin * row_bytes,
                out_at + begin * row_bytes,
            )

    def close(self) -> None:
        """Frees the packed weights. Twice is fine."""
        handle, self._handle = self._handle, c_void_p()
        if handle:
            _call("ktt_layer_destroy", handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def _scale_address(self, name: str, scale: Tensor, matrix: tuple[int, int]) -> int:
        return _address(name, scale, "float32", (_num_blocks(matrix[0]), _num_blocks(matrix[1])))


def _num_blocks(size: int) -> int:
    return -(-size // SCALE_BLOCK)


def _pair_of_sizes(name: str, tensor: Tensor) -> tuple[int, int]:
    shape = tuple(tensor.shape)
    if len(shape) != 2:
        raise NativeError(f"{name} has shape {shape}, but must be [tokens, top_k]")
    return shape[0], shape[1]
