from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton: pip install triton")

from kttrio.layers import fp8_linear as reference
from kttrio.layers.triton.fp8_linear import fp8_linear
from kttrio.weights.formats import fp8
from kttrio.weights.formats.base import Packed
from tests.layers.triton.where import DEVICE, needs_gpu

SCHEMES = ("w8a16", "w8a8")


def check(tokens, sizes, *, scheme, dtype=torch.float32):
    torch.manual_seed(tokens)
    rows, columns = sizes
    packed = fp8.quantize(torch.randn(rows, columns) * columns**-0.5, 128)
    x = (torch.randn(tokens, columns) * torch.rand(tokens, 1)).to(dtype)
    moved = Packed(*(part.to(DEVICE) for part in packed))
    out = fp8_linear(x.to(DEVICE), moved, scheme=scheme)
    assert out.dtype is dtype
    expected = reference.fp8_linear(x, packed, scheme=scheme)
    tolerance = 1e-4 if dtype is torch.float32 else 1.6e-2
    torch.testing.assert_close(out.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_it_is_what_torch_says(tokens, scheme):
    check(tokens, (200, 300), scheme=scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_activations_may_be_bfloat16(scheme):
    check(3, (64, 384), scheme=scheme, dtype=torch.bfloat16)


class TestPublishedSizes:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("tokens", [1, 16, 100, 4096])
    @pytest.mark.parametrize("sizes", [(12288, 2048), (2048, 4096), (7168, 2048), (576, 7168)])
    def test_they_agree_with_torch(self, tokens, sizes, scheme):
        if scheme == "w8a8" and reference.best_scheme(DEVICE) != "w8a8":
            pytest.skip("this chip has no FP8 products")
        check(tokens, sizes, scheme=scheme, dtype=torch.bfloat16)
