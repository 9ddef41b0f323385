"""Our experts in a comparison with another library's, over the protocol that `--plugin` of the
comparing script asks for: `backends(threads)` and objects with build, forward and close.

All backends are given the same weights and routings and are timed in alternating rounds. Where the
script has quantised weights (fp8, int4 with groups of 32) ours takes these very weights, else it
quantises the script's bfloat16 ones itself. Environment variables, because the script has no flags
for plugins:

    KTTRIO_BACKENDS   names out of BACKENDS below, default: those with the fastest activations
    KTTRIO_ISA        as kttrio.native.Pool has it, default: auto
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kttrio.experts.source import Matrices
from kttrio.native import ExpertLayer, Pool
from kttrio.weights.formats.base import Packed, find


class Mode(NamedTuple):  # dataclasses want their module in sys.modules; a plugin's is not there
    """How a backend stores and multiplies."""

    weight_format: str
    group_size: int
    activation: str
    given: str | None = None
    """The script's name for weights that it has quantised in our format."""


BACKENDS = {
    "bf16": Mode("bf16", 0, "bfloat16"),
    "fp8": Mode("fp8", 128, "bfloat16", given="fp8"),
    "int8": Mode("int8", 128, "int8"),
    "int8-a16": Mode("int8", 128, "bfloat16"),
    "int4": Mode("int4", 64, "int8"),
    "int4-a16": Mode("int4", 64, "bfloat16"),
    "int4g32": Mode("int4", 32, "int8", given="int4g32"),
    "int4g32-a16": Mode("int4", 32, "bfloat16", given="int4g32"),
}
FASTEST = "bf16,fp8,int8,int4,int4g32"


class Backend:
    """One mode, on layers of its own."""

    def __init__(self, name: str, mode: Mode, pool: Pool) -> None:
        self.name = f"kttrio.{name}.{pool.isa}"
        self.threads = pool.num_threads
        self.quant_kind = mode.given
        self._mode, self._pool = mode, pool
        self._layers: list[ExpertLayer] = []

    def bytes_per_expert(self, hidden_size: int, intermediate_size: int) -> int:
        wide, form = (intermediate_size, hidden_size), find(self._mode.weight_format)
        return sum(form.nbytes(shape, self._mode.group_size) for shape in (wide, wide, wide[::-1]))

    def build(self, weights: Any, num_layers: int, max_tokens: int) -> None:
        mode = self._mode
        matrices = [self._packed(weights, which) for which in range(3)]
        for _ in range(num_layers):
            layer = ExpertLayer(
                self._pool,
                num_experts=weights.E,
                hidden_size=weights.H,
                intermediate_size=weights.I,
                weight_format=mode.weight_format,
                group_size=mode.group_size,
                activation=mode.activation,
                max_tokens=max_tokens,
                max_top_k=weights.k,
            )
            for expert in range(weights.E):
                given = Matrices(*(matrix[expert % weights.DISTINCT] for matrix in matrices))
                given.pack_into(layer, expert)
            self._layers.append(layer)

    def _packed(self, weights: Any, which: int) -> list[Packed]:
        """One of gate, up and down of every distinct expert."""
        mode = self._mode
        if mode.given is None:
            plain = (weights.gate, weights.up, weights.down)[which]
            return [find(mode.weight_format).quantize(w, mode.group_size) for w in plain]
        codes, scales = weights.quantized(mode.given)[which]
        if mode.given == "fp8":
            codes = codes.view(torch.float8_e4m3fn)
        return [Packed(code, scale) for code, scale in zip(codes, scales, strict=True)]

    def forward(
        self, layer: int, num_tokens: Tensor, ids: Tensor, weights: Tensor, x: Tensor, y: Tensor
    ) -> None:
        count = int(num_tokens)
        ids = ids[:count].to(torch.int32)
        self._layers[layer].forward(x[:count], ids, weights[:count], y[:count])

    def close(self) -> None:
        for layer in self._layers:
            layer.close()
        self._layers.clear()


def backends(threads: int) -> list[Backend]:
    names = os.environ.get("KTTRIO_BACKENDS", FASTEST).split(",")
    for name in set(names).difference(BACKENDS):
        raise ValueError(f"KTTRIO_BACKENDS: {name!r} is none of {', '.join(BACKENDS)}")
    pool = Pool(threads=threads, isa=os.environ.get("KTTRIO_ISA", "auto"))
    return [Backend(name, BACKENDS[name], pool) for name in names]
