"""Compiles what launches would compile, for chips that are not here, and prints what it takes.

Run as a module, in a process in which Triton does not interpret. Tensors are fake ones of a GPU:
they have all that a launch looks at, and no memory.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kttrio.layers.cache import AttentionCache
from kttrio.layers.delta_rule import Heads
from kttrio.layers.paged import Chunks, Latents, Tables
from kttrio.layers.runs import Lanes
from kttrio.layers.triton import gdn, grouped, kernels
from kttrio.layers.triton.fp8_linear import fp8_linear
from kttrio.weights.formats import base as formats
from kttrio.weights.formats.base import Packed
from tests.layers.experts import KINDS

CHIPS = (80, 90)  # compute capability times ten; those between compile like the first
SINCE = {"W8A8": 89}  # the first chip with products of this kind
PAGE, PAGES, SEQUENCES = 64, 1000, 1  # the fewer sequences, the more splits
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def integers(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def tables() -> Tables:
    return Tables(integers(SEQUENCES, 500), integers(SEQUENCES), PAGE)


def grouped_query(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    shape = (PAGES, PAGE, kv_heads, head_dim)
    cache = AttentionCache(*(empty(*shape, dtype=dtype) for _ in range(2)))
    kernels.decode(empty(SEQUENCES, heads, head_dim, dtype=dtype), cache, tables())
    chunks = Chunks(
        integers(SEQUENCES, 500), integers(SEQUENCES), integers(SEQUENCES + 1), 700, PAGE
    )
    kernels.prefill(empty(2000, heads, head_dim, dtype=dtype), cache, chunks)


def latent(heads: int, dtype: torch.dtype) -> None:
    size, rope, num_chosen = 512, 64, 2048
    latents = Latents(empty(PAGES * PAGE, size + rope, dtype=dtype), size, 0.1)
    kernels.latent(empty(SEQUENCES, heads, size + rope, dtype=dtype), latents, tables())
    for count in (SEQUENCES, 2000):  # with splits, and without
        query = empty(count, heads, size + rope, dtype=dtype)
        kernels.sparse(query, latents, integers(count, num_chosen))


def experts(kind: tuple[str, int], dtype: torch.dtype) -> None:
    """Qwen3-Next's, a few of them, for a token and for many."""
    name, group = kind
    form, slots, hidden, width = formats.find(name), 8, 2048, 512
    gate, up, down = (
        stacked(form.quantize(torch.empty(shape), group), slots)
        for shape in ((width, hidden), (width, hidden), (hidden, width))
    )
    for tokens in (1, 2000):
        x, out = (empty(tokens, hidden, dtype=kind) for kind in (dtype, torch.float32))
        ids, weights = (empty(tokens, 10, dtype=kind) for kind in (torch.int32, torch.float32))
        grouped.grouped_mlp(x, ids, weights, (gate, up, down), form=name, out=out)


def stacked(packed: Packed, slots: int) -> Packed:
    return Packed(*(x if x is None else empty(slots, *x.shape, dtype=x.dtype) for x in packed))


def sorted_anyhow(ids: Tensor, *, num_slots: int, rows: int) -> grouped.Blocks:
    """In the place of `sort_by_slot`, as torch slices no fake tensors of a GPU without one."""
    return grouped.Blocks(*(integers(num_slots) for _ in range(3)), integers(ids.numel()))


def linear(scheme: str, dtype: torch.dtype) -> None:
    packed = Packed(
        empty(4096, 2048, dtype=torch.float8_e4m3fn), empty(32, 16, dtype=torch.float32)
    )
    for tokens in (1, 2000):
        fp8_linear(empty(tokens, 2048, dtype=dtype), packed, scheme=scheme)


def delta_rule() -> None:
    """Qwen3-Next's."""
    states = empty(2, 32, 128, 128, dtype=torch.float32)
    for length in (1, 3):
        fresh = empty(2, dtype=torch.bool)
        gdn.decode(delta_heads(length), states, Lanes(integers(2), fresh if length > 1 else None))
    gdn.chunks(delta_heads(300), states)


def delta_heads(length: int) -> Heads:
    lead = (2, length, 32)
    shapes = (*((*lead, 128) for _ in range(3)), lead, lead)
    return Heads(*(empty(*shape, dtype=torch.float32) for shape in shapes))


LAUNCHES: dict[str, Callable[[], None]] = {
    "Qwen3": lambda: grouped_query(32, 4, 128, torch.bfloat16),
    "Qwen3-Next": lambda: grouped_query(16, 2, 256, torch.bfloat16),
    "Qwen3-Next in float32": lambda: grouped_query(16, 2, 256, torch.float32),
    "DeepSeek": lambda: latent(128, torch.bfloat16),
    "DeepSeek in float32": lambda: latent(128, torch.float32),
    **{
        f"experts in {name}": partial(experts, (name, group), torch.bfloat16)
        for name, group in KINDS
        if group != 32
    },
    "W8A16": lambda: linear("w8a16", torch.bfloat16),
    "W8A8": lambda: linear("w8a8", torch.bfloat16),
    "delta rule": delta_rule,
}


def compiled(function: JITFunction, chip: int, args, kwargs) -> int:
    """Bytes of shared memory that a program of this launch takes."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    bound = inspect.signature(function.fn).bind(*args, **kwargs).arguments
    signature, constants, aligned = {}, {}, {}
    for index, param in enumerate(function.params):
        value = bound[param.name]
        if param.is_constexpr:
            signature[param.name], constants[index,] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[param.name] = "*" + TYPES[value.dtype]
            aligned[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        elif value == 1:
            signature[param.name], constants[index,] = "constexpr", value
        else:
            signature[param.name] = "i32"
            if value % 16 == 0:
                aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    return kernel.metadata.shared


def main() -> None:
    grouped.sort_by_slot = sorted_anyhow
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=100)
    for name, launch in LAUNCHES.items():
        for chip in (chip for chip in CHIPS if chip >= SINCE.get(name, 0)):

            def run(function, *args, chip=chip, name=name, grid, warmup, **kwargs):
                shared = compiled(function, chip, args, kwargs)
                print(json.dumps([name, function.__name__, chip, shared]))

            JITFunction.run = run
            with FakeTensorMode():
                launch()


if __name__ == "__main__":
    main()
