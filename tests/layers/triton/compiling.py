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
from kttrio.layers.triton import gdn, kernels
from kttrio.layers.triton.fp8_linear import fp8_linear
from kttrio.layers.triton.grouped import grouped_mlp
from kttrio.weights.formats import base as formats
from kttrio.weights.formats import fp8
from kttrio.weights.formats.base import Packed

CHIPS = (80, 90)  # compute capability times ten; those between compile like the first
PAGE, PAGES, SEQUENCES = 64, 1000, 1  # the fewer sequences, the more splits
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}
TYPES |= {torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def unseen(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """On no device at all: for launches behind operations that want to see a GPU."""
    return torch.empty(shape, dtype=dtype, device="meta")


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


def experts(kind: tuple[str, int], tokens: int) -> None:
    """512 of 2048 x 512 and ten for each token, more of them than a layer has."""
    slots, hidden, width, top_k = 600, 2048, 512, 10
    x, out = (unseen(tokens, hidden, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    ids = unseen(tokens, top_k, dtype=torch.int32)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    gate, up, down = (stack(kind, slots, shape) for shape in shapes)
    shares = unseen(tokens, top_k, dtype=torch.float32)
    grouped_mlp(x, ids, shares, (gate, up, down), form=kind[0], out=out)


def stack(kind: tuple[str, int], slots: int, shape: tuple[int, int]) -> Packed:
    form, group = kind
    if form == "bf16":
        return Packed(unseen(slots, *shape))
    if form == "fp8":
        blocks = unseen(slots, *fp8.scale_shape(shape), dtype=torch.float32)
        return Packed(unseen(slots, *shape, dtype=torch.float8_e4m3fn), blocks)
    dtype = torch.int8 if form == "int8" else torch.uint8
    data = unseen(slots, *formats.find(form).stored_shape(shape), dtype=dtype)
    return Packed(data, unseen(slots, shape[0], shape[1] // group))


def dense(scheme: str, tokens: int) -> None:
    weights = stack(("fp8", fp8.BLOCK), 1, (4096, 2048))
    packed = Packed(weights.data[0], weights.scale[0])
    fp8_linear(unseen(tokens, 2048), packed, scheme=scheme)


def delta_rule() -> None:
    """Qwen3-Next's, with drafts and in chunks."""
    lanes, heads, size = 2, 32, 128

    def tokens(length: int) -> Heads:
        wide = (unseen(lanes, length, heads, size, dtype=torch.float32) for _ in range(3))
        narrow = (unseen(lanes, length, heads, dtype=torch.float32) for _ in range(2))
        return Heads(*wide, *narrow)

    slots, fresh = unseen(lanes, dtype=torch.int64), unseen(lanes, dtype=torch.bool)
    states = unseen(8, heads, size, size, dtype=torch.float32)
    gdn.decode(tokens(3), states, Lanes(slots, fresh))
    gdn.chunks(tokens(2000), states[:lanes])


KINDS = (("bf16", 0), ("fp8", 128), ("int8", 128), ("int4", 32))
LAUNCHES: dict[str, Callable[[], None]] = {
    "Qwen3": lambda: grouped_query(32, 4, 128, torch.bfloat16),
    "Qwen3-Next": lambda: grouped_query(16, 2, 256, torch.bfloat16),
    "Qwen3-Next in float32": lambda: grouped_query(16, 2, 256, torch.float32),
    "DeepSeek": lambda: latent(128, torch.bfloat16),
    "DeepSeek in float32": lambda: latent(128, torch.float32),
    "delta rule": delta_rule,
}
LAUNCHES |= {
    f"{tokens} tokens for experts in {kind}": partial(experts, kind, tokens)
    for kind in KINDS
    for tokens in (1, 4096)
}
LAUNCHES |= {f"{tokens} tokens, w8a16": partial(dense, "w8a16", tokens) for tokens in (1, 4096)}
EIGHT_BITS = {f"{tokens} tokens, w8a8": partial(dense, "w8a8", tokens) for tokens in (1, 4096)}
"""Launches for chips that multiply FP8."""


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
        else:  # what is known of a size decides whether loads are wide and run ahead
            signature[param.name] = "i32"
            if value % 16 == 0:
                aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    return kernel.metadata.shared


def main() -> None:
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=100)
    for chip in CHIPS:
        for name, launch in (LAUNCHES | (EIGHT_BITS if chip > 80 else {})).items():

            def run(function, *args, chip=chip, name=name, grid, warmup, **kwargs):
                shared = compiled(function, chip, args, kwargs)
                print(json.dumps([name, function.__name__, chip, shared]))

            JITFunction.run = run
            with FakeTensorMode():
                launch()


if __name__ == "__main__":
    main()
