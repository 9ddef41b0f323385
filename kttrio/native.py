"""The wall to the C++ expert library: the only file that opens it.

Finds the library, checks dtype, shape and contiguity of what is handed over, and turns error codes
into NativeError. Never imports torch: anything with data_ptr, dtype, shape and device will do.
ctypes lets other Python threads run while a call does.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, NamedTuple, Protocol, Self, TypeVar

_T = TypeVar("_T")

ABI_VERSION = 2
SCALE_BLOCK = 128  # weights along each side of an fp8 scale's square

# Those after "auto" are kernel tables, best first; the last two stand for the best of their kind.
_ISAS = {
    "auto": 0,
    "amx": 3,
    "avx512_bf16": 8,
    "avx512_vnni": 7,
    "avx512_base": 6,
    "avx2_vnni": 5,
    "avx2_base": 4,
    "avx512": 2,
    "avx2": 1,
}
BFLOAT16_ISAS = ("amx", "avx512_bf16")
"""Kernel tables that multiply bfloat16; the others multiply its values as float32."""

_DTYPES = {"float32": 0, "bfloat16": 1}
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
_ACTIVATIONS = {"float32": 0, "bfloat16": 1, "int8": 2}


@dataclass(frozen=True, slots=True)
class _Format:
    """How matrices of a weight format come: stored elements, and a scale for each block of them."""

    value: int
    dtype: str
    bits: int
    scale_dtype: str | None = None
    scale_bytes: int = 0
    scale_rows: int = 1  # that share a scale
    group_size: int = 0  # of the format itself; 0: the caller's, or none

    def stored_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns // 2 if self.bits == 4 else columns  # two to a byte

    def scale_shape(self, rows: int, columns: int, group_size: int) -> tuple[int, int]:
        return -(-rows // self.scale_rows), -(-columns // group_size)


_FORMATS = {
    "bf16": _Format(0, "bfloat16", 16),
    "fp8": _Format(1, "float8_e4m3fn", 8, "float32", 4, SCALE_BLOCK, SCALE_BLOCK),
    "int8": _Format(2, "int8", 8, "bfloat16", 2),
    "int4": _Format(3, "uint8", 4, "bfloat16", 2),
}


class _Expert(ctypes.Structure):
    """ktt_expert"""

    _fields_ = (
        ("gate", c_void_p),
        ("up", c_void_p),
        ("down", c_void_p),
        ("gate_scale", c_void_p),
        ("up_scale", c_void_p),
        ("down_scale", c_void_p),
        ("matrix_bytes", c_uint64),
        ("gate_scale_bytes", c_uint64),
        ("down_scale_bytes", c_uint64),
    )


class _Forward(ctypes.Structure):
    """ktt_forward"""

    _fields_ = (
        ("num_tokens", c_int32),
        ("top_k", c_int32),
        ("ids", c_void_p),
        ("weights", c_void_p),
        ("x", c_void_p),
        ("out", c_void_p),
        ("dtype", c_int32),
        ("accumulate", c_int32),
    )


_INT32_P = POINTER(c_int32)
_HANDLE_P = POINTER(c_void_p)

# Result and arguments of every function of kttrio.h, in the header's order and types.
PROTOTYPES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "ktt_abi_version": (c_int32, ()),
    "ktt_last_error": (c_char_p, ()),
    "ktt_isa_granted": (c_int32, (c_int32,)),
    "ktt_pool_create": (c_int32, (c_int32, c_int32, c_void_p, c_int32, _HANDLE_P)),
    "ktt_pool_destroy": (c_int32, (c_void_p,)),
    "ktt_pool_info": (c_int32, (c_void_p, _INT32_P, _INT32_P, _INT32_P)),
    "ktt_layer_create": (c_int32, (c_void_p, *(c_int32,) * 8, _HANDLE_P)),
    "ktt_layer_destroy": (c_int32, (c_void_p,)),
    "ktt_layer_set_expert": (c_int32, (c_void_p, c_int32, POINTER(_Expert))),
    "ktt_layer_get_expert": (c_int32, (c_void_p, c_int32, POINTER(_Expert))),
    "ktt_layer_clear_expert": (c_int32, (c_void_p, c_int32)),
    "ktt_layer_forward": (c_int32, (c_void_p, POINTER(_Forward))),
    "ktt_job_create": (c_int32, (c_void_p, POINTER(_Forward), *(c_void_p,) * 3, _HANDLE_P)),
    "ktt_job_destroy": (c_int32, (c_void_p,)),
    "ktt_job_submit": (c_int32, (c_void_p,)),
    "ktt_job_wait": (c_int32, (c_void_p,)),
    "ktt_job_submit_on_stream": (None, (c_void_p,)),
    "ktt_job_wait_on_stream": (None, (c_void_p,)),
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
    def shape(self) -> tuple[int, ...]: ...
    @property
    def device(self) -> Device: ...
    @property
    def is_cpu(self) -> bool: ...
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
    """Kernel tables that processor and operating system grant, best first."""
    library = _library()
    tables = tuple(_ISAS)[1:-2]
    return tuple(name for name in tables if library.ktt_isa_granted(_ISAS[name]))


def best_isa(wanted: str) -> str:
    """The kernel table that a pool of this instruction set ("auto", a family, a table) will use.

    Where it is not granted, `wanted` itself: making the pool then tells what is.
    """
    suits = (n for n in isa_available() if wanted == "auto" or n.startswith(wanted))
    return next(suits, wanted)


def _lookup(what: str, value: str, choices: Mapping[str, _T]) -> _T:
    if value not in choices:
        raise NativeError(f"{what} is {value!r}, but must be one of {', '.join(choices)}")
    return choices[value]


def _int32(name: str, value: int) -> int:
    """The same number; ctypes alone would cut off what does not fit."""
    if not -(2**31) <= value < 2**31:
        raise NativeError(f"{name} is {value}, which is too large")
    return value


@functools.cache
def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _address(name: str, tensor: Tensor, dtype: str, shape: tuple[int, ...]) -> int:
    """The tensor's address, once it is known to be exactly what the library will use there.

    On the path of every forward: nothing is asked twice, and texts are made for errors only.
    """
    if _dtype_name(tensor.dtype) != dtype:
        raise NativeError(f"{name} is {_dtype_name(tensor.dtype)}, but must be {dtype}")
    if tensor.shape != shape:
        raise NativeError(f"{name} has shape {tuple(tensor.shape)}, but must have {shape}")
    if not tensor.is_cpu:  # a sixth of the time that device.type takes
        raise NativeError(f"{name} is on {tensor.device.type}; move it to the CPU first")
    if not tensor.is_contiguous():
        raise NativeError(f"{name} is not contiguous; pass {name}.contiguous()")
    return tensor.data_ptr()


class _Owner:
    """Holds something of the library's and gives it back once."""

    _kind: ClassVar[str]

    def __init__(self) -> None:
        self._handle = c_void_p()

    @property
    def handle(self) -> c_void_p:
        """The library's own handle; an error once this is closed."""
        if not self._handle:
            raise NativeError(f"the {self._kind} is closed")
        return self._handle

    @property
    def is_open(self) -> bool:
        return bool(self._handle)

    def close(self) -> None:
        """Give it back. Twice is fine."""
        handle, self._handle = self._handle, c_void_p()
        if handle:
            _call(f"ktt_{self._kind}_destroy", handle)

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


class Pool(_Owner):
    """Worker threads, and the kernels they run; shared by all layers, ends with the last of them.

    `threads` counts the calling thread, default: the cores this process may use. The pool has one
    part for each of `nodes` (NUMA nodes; one may come twice), or `parts` parts dealt over the NUMA
    nodes, default: one for each node. Experts are cut along their intermediate size over the parts.
    `isa` afterwards names the kernel table in use.
    """

    _kind = "pool"

    def __init__(
        self,
        *,
        threads: int | None = None,
        nodes: Sequence[int] | None = None,
        parts: int | None = None,
        isa: str = "auto",
    ) -> None:
        super().__init__()
        if threads is not None and threads < 1:
            raise NativeError(f"threads is {threads}, but must be at least 1")
        if parts is not None and parts < 1:
            raise NativeError(f"parts is {parts}, but must be at least 1")
        if nodes and parts is not None and parts != len(nodes):
            raise NativeError(f"parts is {parts}, but {len(nodes)} nodes are named")
        numbers = [_int32("a node", node) for node in nodes or ()]
        _call(
            "ktt_pool_create",
            _lookup("isa", isa, _ISAS),
            _int32("threads", threads or 0),
            (c_int32 * len(numbers))(*numbers) if numbers else None,
            len(numbers) if numbers else _int32("parts", parts or 0),
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


class ExpertLayer(_Owner):
    """One MoE layer's routed experts, packed in the library's memory.

    `weight_format` is bf16, fp8, int8 or int4; the last two have a scale for `group_size` (32, 64
    or 128) weights of a row. `activation` says what the matrix products multiply: "float32" is
    exact, "bfloat16" rounds activations and is fast, "int8" (for int8 and int4 weights) quantises
    them by group. Sums are fp32. hidden_size and intermediate_size are multiples of 32. A forward
    may bring more than `max_tokens` tokens; it then runs in slices of that size.
    """

    _kind = "layer"

    def __init__(
        self,
        pool: Pool,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        weight_format: str,
        group_size: int = 0,
        activation: str,
        max_tokens: int,
        max_top_k: int,
    ) -> None:
        super().__init__()
        self._format = _lookup("weight_format", weight_format, _FORMATS)
        self._group_size = group_size or self._format.group_size
        self._jobs: weakref.WeakSet[Job] = weakref.WeakSet()
        _call(
            "ktt_layer_create",
            pool.handle,
            _int32("num_experts", num_experts),
            _int32("hidden_size", hidden_size),
            _int32("intermediate_size", intermediate_size),
            self._format.value,
            _int32("group_size", self._group_size),
            _lookup("activation", activation, _ACTIVATIONS),
            _int32("max_tokens", max_tokens),
            _int32("max_top_k", max_top_k),
            ctypes.byref(self._handle),
        )
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.weight_format = weight_format
        self.max_tokens = max_tokens

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
        """Copy one expert's weights: gate and up [inter, hidden], down [hidden, inter].

        bf16: bfloat16. fp8: float8_e4m3fn, fp32 scales [ceil(out / 128), ceil(in / 128)]. int8:
        int8, int4: uint8 [out, in / 2], both with bfloat16 scales [out, ceil(in / group_size)].
        What is no finite number is refused, and the expert is then not set. Replacing an expert
        is fine, also between forwards of other threads.
        """
        matrices, scales = (gate, up, down), (gate_scale, up_scale, down_scale)
        block = self._expert(matrices, scales)
        _call("ktt_layer_set_expert", self.handle, _int32("expert", expert), ctypes.byref(block))

    def get_expert(
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
        """Fill the tensors with an expert that is set, bit for bit as `set_expert` took them.

        On the calling thread alone, beside forwards and beside other threads that do the same.
        """
        matrices, scales = (gate, up, down), (gate_scale, up_scale, down_scale)
        block = self._expert(matrices, scales)
        _call("ktt_layer_get_expert", self.handle, _int32("expert", expert), ctypes.byref(block))

    def clear_expert(self, expert: int) -> None:
        """Take an expert out and give its memory back; one that is not set is fine."""
        _call("ktt_layer_clear_expert", self.handle, _int32("expert", expert))

    def forward(
        self, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor, *, accumulate: bool = False
    ) -> None:
        """out[t] = sum over k of weights[t, k] * expert ids[t, k] of x[t]; id -1 is skipped.

        x and out [tokens, hidden], both fp32 or both bfloat16; ids int32 and weights fp32
        [tokens, top_k]. With `accumulate` the sum is added to out. Blocks until done. A token's
        result never depends on the others.
        """
        args = self._forward_args((x, ids, weights, out), accumulate=accumulate)
        left = args.num_tokens
        while left > self.max_tokens:
            args.num_tokens = self.max_tokens
            _call("ktt_layer_forward", self.handle, ctypes.byref(args))
            left -= self.max_tokens
            self._skip_slice(args, _ELEMENT_BYTES[_dtype_name(x.dtype)])
        if left:
            args.num_tokens = left
            _call("ktt_layer_forward", self.handle, ctypes.byref(args))

    def _skip_slice(self, args: _Forward, element_bytes: int) -> None:
        """Let the block begin `max_tokens` tokens further on."""
        choice_bytes = 4 * args.top_k  # of an int32 id, and of a float32 weight
        row_bytes = self.hidden_size * element_bytes
        args.ids += self.max_tokens * choice_bytes
        args.weights += self.max_tokens * choice_bytes
        args.x += self.max_tokens * row_bytes
        args.out += self.max_tokens * row_bytes

    def job(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        out: Tensor,
        *,
        accumulate: bool = False,
        num_tokens: Tensor | None = None,
        ready: Tensor | None = None,
        done: Tensor | None = None,
        by_waiter: bool = False,
    ) -> Job:
        """A forward of at most `max_tokens` tokens with these tensors, to be started many times.

        They are read when the job runs, and kept alive by it. `num_tokens`, `ready` and `done` are
        int32 [1], in pinned memory if a device is to write or read them: how many of the tokens
        count; a counter of the submissions whose input is there, which the job waits for; the
        number of submissions that have run, which it stores. `by_waiter`, which goes without these
        two: it runs in the thread that waits for it.
        """
        tensors = (x, ids, weights, out)
        args = self._forward_args(tensors, accumulate=accumulate)
        flags = {"num_tokens": num_tokens, "ready": ready, "done": done}
        if by_waiter and not (ready is None and done is None):
            raise NativeError("a job that its waiter runs has no use for ready and done")
        job = (WaitersJob if by_waiter else Job)(self, args, flags, keep_alive=tensors)
        self._jobs.add(job)
        return job

    def close(self) -> None:
        """Free the packed weights, after the layer's jobs. Twice is fine."""
        for job in tuple(getattr(self, "_jobs", ())):
            job.close()
        super().close()

    def _expert(self, matrices: Sequence[Tensor], scales: Sequence[Tensor | None]) -> _Expert:
        wide = (self.intermediate_size, self.hidden_size)
        names, shapes = ("gate", "up", "down"), (wide, wide, wide[::-1])
        stored_dtype, stored_shape = self._format.dtype, self._format.stored_shape
        block = _Expert(matrix_bytes=wide[0] * wide[1] * self._format.bits // 8)
        for name, shape, matrix, scale in zip(names, shapes, matrices, scales, strict=True):
            setattr(block, name, _address(name, matrix, stored_dtype, stored_shape(*shape)))
            name += "_scale"
            address, num_bytes = self._scale(name, scale, shape)
            setattr(block, name, address)
            if name != "up_scale":
                setattr(block, f"{name}_bytes", num_bytes)
        return block

    def _scale(
        self, name: str, scale: Tensor | None, matrix: tuple[int, int]
    ) -> tuple[int | None, int]:
        """Address and size of a matrix's scales."""
        form = self._format
        if form.scale_dtype is None:
            if scale is not None:
                raise NativeError(f"{self.weight_format} weights have no scales, leave {name} out")
            return None, 0
        if scale is None:
            raise NativeError(f"{name} is missing: {self.weight_format} weights have scales")
        rows, columns = shape = form.scale_shape(*matrix, self._group_size)
        return _address(name, scale, form.scale_dtype, shape), rows * columns * form.scale_bytes

    def _forward_args(
        self, tensors: tuple[Tensor, Tensor, Tensor, Tensor], *, accumulate: bool
    ) -> _Forward:
        x, ids, weights, out = tensors
        choices = num_tokens, top_k = _pair_of_sizes("ids", ids)
        rows = num_tokens, self.hidden_size
        dtype = _dtype_name(x.dtype)
        value = _lookup("dtype of x", dtype, _DTYPES)
        return _Forward(  # by position: by name takes longer
            _int32("the number of tokens", num_tokens),
            _int32("top_k", top_k),
            _address("ids", ids, "int32", choices),
            _address("weights", weights, "float32", choices),
            _address("x", x, dtype, rows),
            _address("out", out, dtype, rows),
            value,
            accumulate,
        )


class HostFunctions(NamedTuple):
    """Addresses of functions that a CUDA stream can call with a job's handle (cudaLaunchHostFunc).

    What goes wrong in them is kept for the next `wait`.
    """

    submit: int
    wait: int


def host_functions() -> HostFunctions:
    """Those of the library in use."""
    library = _library()
    names = ("ktt_job_submit_on_stream", "ktt_job_wait_on_stream")
    submit, wait = (ctypes.cast(getattr(library, name), c_void_p).value or 0 for name in names)
    return HostFunctions(submit, wait)


class Job(_Owner):
    """A forward that runs without its caller, made by `ExpertLayer.job`; closed with its layer.

    Jobs of one pool run in the order they were submitted, on the pool's own thread.
    """

    _kind = "job"

    def __init__(
        self,
        layer: ExpertLayer,
        args: _Forward,
        flags: Mapping[str, Tensor | None],
        *,
        keep_alive: Sequence[Tensor],
    ) -> None:
        super().__init__()
        self._keep_alive = (layer, flags, keep_alive)
        addresses = {name: _flag_address(name, flag) for name, flag in flags.items()}
        _call(
            "ktt_job_create",
            layer.handle,
            ctypes.byref(args),
            addresses["num_tokens"],
            addresses["ready"],
            addresses["done"],
            ctypes.byref(self._handle),
        )

    def submit(self) -> None:
        """Start it; an error when the last submission is still pending."""
        _call("ktt_job_submit", self.handle)

    def wait(self) -> None:
        """Block until it has run; raises what went wrong since the last wait."""
        _call("ktt_job_wait", self.handle)

    def join(self) -> None:
        """Block until it has run; what went wrong is kept for the next `wait`."""
        _library().ktt_job_wait_on_stream(self.handle)


class WaitersJob(Job):
    """A job that runs in the thread that waits for it, as `ExpertLayer.forward` does.

    Where host and device are the same processor nothing is won by doing both at once, and handing
    over to another thread takes its time.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        args: _Forward,
        flags: Mapping[str, Tensor | None],
        *,
        keep_alive: Sequence[Tensor],
    ) -> None:
        super().__init__(layer, args, flags, keep_alive=keep_alive)
        self._layer, self._args = layer, args
        self._num_tokens, self._most_tokens = flags["num_tokens"], args.num_tokens
        self._is_pending = False
        self._error: NativeError | None = None

    def submit(self) -> None:
        if self._is_pending:
            raise NativeError("this job is still pending; wait for it before it is submitted again")
        self._is_pending = bool(self.handle)  # an error once it is closed

    def wait(self) -> None:
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        if not self._is_pending:
            return
        self._is_pending = False
        try:
            self._forward()
        except NativeError as error:
            self._error = self._error or error

    def close(self) -> None:
        self._is_pending = False
        super().close()

    def _forward(self) -> None:
        if self._num_tokens is not None:
            self._args.num_tokens = c_int32.from_address(self._num_tokens.data_ptr()).value
        if not 0 <= self._args.num_tokens <= self._most_tokens:
            raise NativeError(
                f"num_tokens is {self._args.num_tokens}, but this job takes from 0 to "
                f"{self._most_tokens}"
            )
        _call("ktt_layer_forward", self._layer.handle, ctypes.byref(self._args))


def _flag_address(name: str, flag: Tensor | None) -> int | None:
    return None if flag is None else _address(name, flag, "int32", (1,))


def _pair_of_sizes(name: str, tensor: Tensor) -> tuple[int, int]:
    shape = tensor.shape
    if len(shape) != 2:
        raise NativeError(f"{name} has shape {tuple(shape)}, but must be [tokens, top_k]")
    return shape[0], shape[1]
