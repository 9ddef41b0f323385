from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.formats import base, bf16, fp8


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
    assert base.names() == ("bf16", "fp8")
    assert base.find("fp8") is fp8
    with pytest.raises(CheckpointError, match=r"'int3'; known: bf16, fp8"):
        base.find("int3")


def test_the_companion_decides_tensor_by_tensor(stored):
    weight = torch.zeros(4, 4)
    checkpoint = stored(a=weight, b=weight.to(torch.float8_e4m3fn), b_scale_inv=torch.ones(1, 1))
    assert base.stored_format(checkpoint, "a") == "bf16"
    assert base.stored_format(checkpoint, "b") == "fp8"


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
    packed = fp8.quantize(weight)
    assert packed.data.shape == weight.shape
    assert packed.scale.shape == (2, 3)
    error = (fp8.dequantize(packed, torch.float32) - weight).abs()
    smallest_step = packed.scale.repeat_interleave(128, 0).repeat_interleave(128, 1) * 2**-9
    bound = torch.maximum(weight.abs() * 2**-4, smallest_step[:200, :300] / 2)
    assert (error <= bound * 1.001).all()


def test_fp8_quantize_keeps_what_it_can_represent():
    packed = fp8.quantize(torch.zeros(3, 3))
    assert torch.equal(fp8.dequantize(packed, torch.float32), torch.zeros(3, 3))
    again = fp8.dequantize(fp8.quantize(torch.tensor([[448.0, -1.5]])), torch.float32)
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
    packed = bf16.quantize(torch.tensor([1.0, 1.0 + 2**-9, 1.0 + 3 * 2**-9]))
    assert packed.data.tolist() == [1.0, 1.0, 1.0 + 2**-7]
    assert bf16.dequantize(packed, torch.float32).dtype is torch.float32


def test_bytes_are_those_of_the_tensors():
    weight = torch.randn(130, 257)
    for form in (bf16, fp8):
        packed = form.quantize(weight)
        held = packed.data.nbytes + (0 if packed.scale is None else packed.scale.nbytes)
        assert form.nbytes((130, 257)) == held
