from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from kttrio.weights import groups
from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.formats import base, bf16, fp8, int4, int8


@pytest.fixture
def stored(tmp_path):
    """Opens a checkpoint of the given tensors."""
    opened = []

    def write(**tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        opened.append(Checkpoint(tmp_path))
        return opened[-1]

    yield write
    for checkpoint in opened:
        checkpoint.__exit__()


def test_formats_are_found_by_file_name():
    assert base.names() == ("bf16", "fp8", "int4", "int8")
    assert base.find("fp8") is fp8
    with pytest.raises(CheckpointError, match=r"'int3'; known: bf16, fp8, int4, int8"):
        base.find("int3")


def test_dtype_and_companion_decide_tensor_by_tensor(stored):
    weight, scale = torch.zeros(4, 4), torch.ones(4, 1).bfloat16()
    checkpoint = stored(
        a=weight,
        b=weight.to(torch.float8_e4m3fn),
        b_scale_inv=torch.ones(1, 1),
        c=weight.to(torch.int8),
        c_scale=scale,
        d=weight.to(torch.uint8),
        d_scale=scale.clone(),
    )
    found = [base.stored_format(checkpoint, name) for name in "abcd"]
    assert found == ["bf16", "fp8", "int8", "int4"]


@pytest.mark.parametrize("shape", [(128, 128), (5, 96), (130, 160)])
@pytest.mark.parametrize("form", [bf16, fp8, int8, int4], ids=lambda form: form.__name__[-4:])
def test_what_is_quantised_is_recognised_checked_and_loaded(stored, form, shape):
    for group in form.GROUPS:
        weight = torch.randn(shape)
        packed = form.quantize(weight, group)
        tensors = {"w": packed.data}
        if packed.scale is not None:
            tensors["w" + form.COMPANION] = packed.scale
        checkpoint = stored(**tensors)
        assert base.find(base.stored_format(checkpoint, "w")) is form
        assert checkpoint.entry("w").shape == form.stored_shape(shape)
        form.check(checkpoint, "w")
        assert group in form.group_sizes(checkpoint, "w")
        assert sum(entry.nbytes for entry in checkpoint.entries.values()) == form.nbytes(
            shape, group
        )
        again = form.dequantize(form.load(checkpoint, "w"), torch.bfloat16)
        assert again.dtype is torch.bfloat16
        assert torch.equal(again, form.dequantize(packed, torch.bfloat16))
        empty = form.empty(shape, group, torch.device("cpu"))
        for room, tensor in zip(empty, packed, strict=True):
            assert (room is None) == (tensor is None)
            assert room is None or (room.shape, room.dtype) == (tensor.shape, tensor.dtype)
        assert (again.float() - weight).norm() < 0.12 * weight.norm()


@pytest.mark.parametrize("group", groups.SIZES)
def test_int8_rounds_each_group_to_its_own_scale(group):
    weight = torch.randn(7, 160) * torch.logspace(-3, 3, 160)
    packed = int8.quantize(weight, group)
    assert packed.scale.shape == (7, -(-160 // group))
    assert packed.scale.dtype is torch.bfloat16
    step = packed.scale.float().repeat_interleave(group, 1)[:, :160]
    error = (int8.dequantize(packed, torch.float32) - weight).abs()
    assert (error <= step * 0.501 + weight.abs() * 2**-8).all()
    assert packed.data.min() >= -127


def test_int4_packs_the_even_column_into_the_low_bits():
    # An extreme of -8 steps, so that every code is met; the refit keeps an exact fit.
    weight = torch.arange(-8.0, 8.0).repeat(2).view(1, 32)
    packed = int4.quantize(weight, 32)
    low, high = packed.data & 15, packed.data >> 4
    assert (low.int() - 8).tolist()[0] == list(range(-8, 8, 2)) * 2
    assert (high.int() - 8).tolist()[0] == list(range(-7, 8, 2)) * 2
    assert torch.equal(int4.dequantize(packed, torch.float32), weight)
    assert torch.equal(int4.dequantize(int4.quantize(-weight, 32), torch.float32), -weight)


@pytest.mark.parametrize("group", groups.SIZES)
def test_int4_is_better_than_the_plain_scale(group):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(group))
    folded = weight.view(64, -1, group)
    scale = folded.abs().amax(-1, keepdim=True) / 7
    plain = ((folded / scale).round() * scale).view(64, 256)
    found = int4.dequantize(int4.quantize(weight, group), torch.float32)
    assert (found - weight).norm() < 0.88 * (plain - weight).norm()


@pytest.mark.parametrize("form", [int8, int4])
def test_groups_of_nothing_and_of_next_to_nothing_stay_finite(form):
    weight = torch.zeros(3, 64)
    weight[1], weight[2, 5] = 1e-38, 1e30
    found = form.dequantize(form.quantize(weight, 32), torch.float32)
    assert torch.equal(found[0], weight[0])
    assert torch.isfinite(found).all()
    assert found[1].abs().max() < 1e-30
    assert found[2, 5] == pytest.approx(1e30, rel=0.02)
    assert found[2].count_nonzero() == 1


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(4, 3).bfloat16(), r"'w_scale' in .* has shape \[4, 3\].*row of \[4, 256\]"),
        (torch.ones(3, 2).bfloat16(), r"'w_scale' in .* has shape \[3, 2\]"),
        (torch.ones(4).bfloat16(), r"'w_scale' in .* has shape \[4\]"),
        (torch.ones(4, 2), r"'w_scale' in .* is torch\.float32, not bfloat16"),
    ],
)
@pytest.mark.parametrize(
    ("form", "data"),
    [
        (int8, torch.zeros(4, 256, dtype=torch.int8)),
        (int4, torch.zeros(4, 128, dtype=torch.uint8)),
    ],
)
def test_integers_refuse_scales_they_would_misread(stored, form, data, scale, message):
    with pytest.raises(CheckpointError, match=message):
        form.check(stored(w=data, w_scale=scale), "w")


@pytest.mark.parametrize("form", [int8, int4])
def test_integers_are_matrices(stored, form):
    dtype = torch.int8 if form is int8 else torch.uint8
    checkpoint = stored(w=torch.zeros(4, dtype=dtype), w_scale=torch.ones(4, 1).bfloat16())
    with pytest.raises(CheckpointError, match=r"'w' in .* is no matrix"):
        form.check(checkpoint, "w")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (5, 300)])
def test_fp8_scales_belong_to_blocks_of_128(stored, dtype, shape):
    rows, columns = fp8.scale_shape(shape)
    scale = 1.0 + torch.arange(rows * columns).view(rows, columns)  # exact in bfloat16
    data = torch.randn(shape).to(torch.float8_e4m3fn)
    checkpoint = stored(w=data, w_scale_inv=scale.to(dtype))
    fp8.check(checkpoint, "w")
    packed = fp8.load(checkpoint, "w")
    assert packed.scale.dtype is torch.float32
    weight = fp8.dequantize(packed, torch.float32)
    for row in range(0, shape[0], 127):
        for column in range(0, shape[1], 127):
            expected = data[row, column].float() * scale[row // 128, column // 128]
            assert weight[row, column] == expected


def test_fp8_quantize_stays_within_half_a_step():
    weight = torch.randn(200, 300) * torch.logspace(-3, 3, 300)
    packed = fp8.quantize(weight, 128)
    assert packed.data.shape == weight.shape
    assert packed.scale.shape == (2, 3)
    error = (fp8.dequantize(packed, torch.float32) - weight).abs()
    smallest_step = packed.scale.repeat_interleave(128, 0).repeat_interleave(128, 1) * 2**-9
    bound = torch.maximum(weight.abs() * 2**-4, smallest_step[:200, :300] / 2)
    assert (error <= bound * 1.001).all()


def test_fp8_quantize_keeps_what_it_can_represent():
    packed = fp8.quantize(torch.zeros(3, 3), 128)
    assert torch.equal(fp8.dequantize(packed, torch.float32), torch.zeros(3, 3))
    again = fp8.dequantize(fp8.quantize(torch.tensor([[448.0, -1.5]]), 128), torch.float32)
    assert torch.equal(again, torch.tensor([[448.0, -1.5]]))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"w": torch.zeros(4, 4), "w_scale_inv": torch.ones(1, 1)},
            "has scales .* not float8_e4m3fn",
        ),
        (
            {"w": torch.zeros(4, 4).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1, 2)},
            r"'w_scale_inv' in .*model\.safetensors has shape \[1, 2\]",
        ),
        (
            {
                "w": torch.zeros(4, 4).to(torch.float8_e4m3fn),
                "w_scale_inv": torch.ones(1, 1, dtype=torch.int32),
            },
            "not a float",
        ),
    ],
)
def test_fp8_refuses_what_it_would_misread(stored, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        fp8.check(stored(**tensors), "w")


def test_bf16_refuses_fp8_without_scales(stored):
    checkpoint = stored(w=torch.zeros(4, 4).to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match=r"'w' in .* without the scales"):
        bf16.check(checkpoint, "w")


def test_bf16_rounds_to_nearest():
    packed = bf16.quantize(torch.tensor([1.0, 1.0 + 2**-9, 1.0 + 3 * 2**-9]), 0)
    assert packed.data.tolist() == [1.0, 1.0, 1.0 + 2**-7]
    assert bf16.dequantize(packed, torch.float32).dtype is torch.float32


def test_fp8_codes_mean_what_torch_says():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    found = fp8.dequantize(base.Packed(codes, torch.ones(1, 1)), torch.float32)
    torch.testing.assert_close(found, codes.float(), rtol=0, atol=0, equal_nan=True)
