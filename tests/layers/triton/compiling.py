"""Compiles what launches would compile, for chips that are not here, and prints what it takes.

Run as a module, in a process in which Triton does not interpret. Tensors are fake ones of a GPU:
they have all that a launch looks at, and no memory.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from types import SimpleNamespace

import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kttrio.layers.cache import AttentionCache
from kttrio.layers.paged import Chunks, Latents, Tables
from kttrio.layers.triton import kernels

CHIPS = (80, 90)  # compute capability times ten; those between compile like the first
PAGE, PAGES, SEQUENCES = 64, 1000, 1  # the fewer sequences, the more splits
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}
OPTIONS = ("num_warps", "num_stages")


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


LAUNCHES: dict[str, Callable[[], None]] = {
    "Qwen3": lambda: grouped_query(32, 4, 128, torch.bfloat16),
    "Qwen3-Next": lambda: grouped_query(16, 2, 256, torch.bfloat16),
    "Qwen3-Next in float32": lambda: grouped_query(16, 2, 256, torch.float32),
    "DeepSeek": lambda: latent(128, torch.bfloat16),
    "DeepSeek in float32": lambda: latent(128, torch.float32),
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
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(function, signature, constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    return kernel.metadata.shared


def main() -> None:
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=100)
    for name, launch in LAUNCHES.items():
        for chip in CHIPS:

            def run(function, *args, chip=chip, name=name, grid, warmup, **kwargs):
                shared = compiled(function, chip, args, kwargs)
                print(json.dumps([name, function.__name__, chip, shared]))

            JITFunction.run = run
            with FakeTensorMode():
                launch()


if __name__ == "__main__":
    main()
