"""The plugin does what the comparing script asks of a backend."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from kttrio.weights.formats.base import Packed, find

PLUGIN = Path(__file__).parents[2] / "tools" / "bench" / "peer_plugin.py"
FORMATS = {"fp8": ("fp8", 128), "int4g32": ("int4", 32)}  # by the script's names


class Weights:
    """As much of the script's own as backends use."""

    DISTINCT = 2

    def __init__(self) -> None:
        self.E, self.k, self.H, self.I = 5, 2, 256, 128
        torch.manual_seed(0)
        self.gate, self.up = self._draw(self.I, self.H), self._draw(self.I, self.H)
        self.down = self._draw(self.H, self.I)

    def _draw(self, rows: int, columns: int) -> Tensor:
        return (torch.randn(self.DISTINCT, rows, columns) * columns**-0.5).to(torch.bfloat16)

    def quantized(self, kind: str) -> list[tuple[Tensor, Tensor]]:
        name, group = FORMATS[kind]
        packed = [
            [find(name).quantize(w.float(), group) for w in matrix]
            for matrix in (self.gate, self.up, self.down)
        ]
        return [
            (
                torch.stack([w.data.view(torch.uint8) for w in experts]),
                torch.stack([w.scale for w in experts if w.scale is not None]),
            )
            for experts in packed
        ]


def load_as_the_script_does() -> ModuleType:
    spec = importlib.util.spec_from_file_location("moe_plugin", PLUGIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_backends_compute_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_as_the_script_does()
    monkeypatch.setenv("KTTRIO_BACKENDS", ",".join(module.BACKENDS))
    weights = Weights()
    x = torch.randn(3, weights.H).to(torch.bfloat16)
    ids = torch.tensor([[0, 1], [4, 2], [3, 0]])
    shares = torch.full((3, 2), 0.5)
    for backend in module.backends(1):
        backend.build(weights, 1, 8)
        y = torch.empty_like(x)
        backend.forward(0, torch.tensor([3], dtype=torch.int32), ids, shares, x, y)
        wanted = sum(expert(weights, backend, ids[:, i], x) * 0.5 for i in range(2))
        error = float((y.float() - wanted).norm() / wanted.norm())
        is_given = backend.quant_kind is not None or backend.name.startswith("kttrio.bf16")
        assert error < (3e-2 if is_given else 0.3), backend.name
        num_bytes = backend.bytes_per_expert(weights.H, weights.I)
        assert num_bytes == pytest.approx(backend._layers[0].nbytes / weights.E, rel=0.01)
        backend.close()


def expert(weights: Weights, backend: object, ids: Tensor, x: Tensor) -> Tensor:
    """Each row's expert, in fp32, with the weights that the script gave."""
    kind = getattr(backend, "quant_kind", None)
    matrices = [m.float() for m in (weights.gate, weights.up, weights.down)]
    if kind is not None:
        name, _ = FORMATS[kind]
        matrices = [
            torch.stack([dequantized(name, *pair) for pair in zip(codes, scales, strict=True)])
            for codes, scales in weights.quantized(kind)
        ]
    gate, up, down = (matrix[ids % weights.DISTINCT] for matrix in matrices)
    column = x.float()[:, :, None]
    return (down @ (silu(gate @ column) * (up @ column)))[:, :, 0]


def dequantized(name: str, codes: Tensor, scale: Tensor) -> Tensor:
    data = codes.view(torch.float8_e4m3fn) if name == "fp8" else codes
    return find(name).dequantize(Packed(data, scale), torch.float32)


def test_a_backend_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTTRIO_BACKENDS", "bf16,int5")
    with pytest.raises(ValueError, match="'int5' is none of bf16, fp8"):
        load_as_the_script_does().backends(1)
