from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kttrio.layers.fp8_linear import Fp8Linear, best_scheme, rounded
from kttrio.layers.linear import Linear
from kttrio.weights.formats import fp8


def make(rows, columns, *, bias=False, scheme="w8a16"):
    torch.manual_seed(0)
    packed = fp8.quantize(torch.randn(rows, columns), 128)
    plain = Linear(columns, rows, dtype=torch.float32, bias=bias)
    if bias:
        plain.bias.normal_()
    linear = Fp8Linear(plain, backend="torch", scheme=scheme)
    linear.weight.copy_(packed.data)
    linear.scale.copy_(packed.scale)
    return linear, fp8.dequantize(packed, torch.float32)


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_product_with_what_is_stored(bias):
    linear, weight = make(200, 300, bias=bias)
    x = torch.randn(2, 3, 300)
    torch.testing.assert_close(linear(x), F.linear(x, weight, linear.bias))


def test_results_have_the_dtype_of_x_and_sums_are_float32():
    linear, weight = make(130, 300)
    x = torch.randn(4, 300).bfloat16()
    exact = F.linear(x.float(), weight)
    assert linear(x).equal(exact.bfloat16())


def test_no_tokens_are_no_outputs():
    for scheme in ("w8a16", "w8a8"):
        assert make(10, 300, scheme=scheme)[0](torch.empty(0, 300)).shape == (0, 10)


def test_rounding_is_within_half_a_step_of_each_group():
    """e4m3 has three bits of fraction, and steps of 2^-9 below 2^-6, in units of amax / 448."""
    torch.manual_seed(0)
    x = torch.randn(5, 300) * torch.exp2(torch.randn(5, 300) * 6)
    groups = F.pad(x, (0, 84)).view(5, 3, 128).abs().amax(-1)
    unit = (groups / 448).repeat_interleave(128, 1)[:, :300]
    step = torch.maximum(x.abs() / 16, unit * 2**-10)
    assert ((rounded(x) - x).abs() <= step * (1 + 1e-5)).all()
    assert not rounded(x).equal(x)


def test_rounded_activations_meet_the_stored_weights():
    linear, weight = make(64, 256, scheme="w8a8")
    x = torch.randn(3, 256)
    torch.testing.assert_close(linear(x), F.linear(rounded(x), weight))


def test_a_cpu_has_no_fp8_products():
    assert best_scheme(torch.device("cpu")) == "w8a16"
