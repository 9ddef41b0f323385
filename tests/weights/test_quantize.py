from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import save_file

from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.formats import base as formats
from kttrio.weights.formats import fp8
from kttrio.weights.loader import Part
from kttrio.weights.quantize import Deviation, Target, quantise, quantise_all

ROWS, COLUMNS = 700, 1056  # several slabs, the last one ragged; ragged groups and squares
SHAPE = (ROWS, COLUMNS)
TARGETS = [Target("int4", 64), Target("int8", 128), Target("fp8", 128)]


@pytest.fixture
def checkpoint(tmp_path):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(SHAPE, generator=generator)
    packed = fp8.quantize(weight, 128)
    bad = weight.clone()
    bad[600, 3] = torch.inf
    tensors = {
        "bf16": weight.bfloat16(),
        "f32": weight,
        "fp8": packed.data,
        "fp8_scale_inv": packed.scale,
        "bad": bad,
        **{f"n{i}": torch.randn(64, 64, generator=generator) for i in range(20)},
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as opened:
        yield opened


def plain(checkpoint, name):
    form = formats.find(formats.stored_format(checkpoint, name))
    return form.dequantize(form.load(checkpoint, name), torch.float32)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.form)
@pytest.mark.parametrize("name", ["bf16", "f32"])
def test_slabs_do_not_show(checkpoint, name, target):
    form, weight = formats.find(target.form), plain(checkpoint, name)
    whole = form.quantize(weight, target.group)
    part, packed, deviation = quantise(checkpoint, Part(name, SHAPE), target)
    assert part.name == name
    assert torch.equal(packed.data.view(torch.uint8), whole.data.view(torch.uint8))
    assert torch.equal(packed.scale, whole.scale)
    error = form.dequantize(packed, torch.float32) - weight
    assert deviation.relative == pytest.approx(float(error.norm() / weight.norm()), rel=1e-4)


@pytest.mark.parametrize("target", TARGETS[:2], ids=lambda target: target.form)
def test_fp8_is_taken_for_exactly_what_it_means(checkpoint, target):
    form = formats.find(target.form)
    whole = form.quantize(plain(checkpoint, "fp8"), target.group)
    packed = quantise(checkpoint, Part("fp8", SHAPE), target).packed
    assert torch.equal(packed.data, whole.data)
    assert torch.equal(packed.scale, whole.scale)


def test_what_is_in_the_format_already_stays_as_it_is(checkpoint):
    _, packed, deviation = quantise(checkpoint, Part("fp8", SHAPE), Target("fp8", 128))
    assert torch.equal(packed.data.view(torch.uint8), checkpoint.read("fp8").view(torch.uint8))
    assert deviation.relative == 0


def test_weights_that_are_no_numbers_are_named(checkpoint):
    with pytest.raises(CheckpointError, match=r"'bad' in .*model\.safetensors .* not finite"):
        quantise(checkpoint, Part("bad", SHAPE), TARGETS[0])


@pytest.mark.parametrize("threads", [1, 3])
def test_many_come_in_order_and_leave_torch_as_it_was(checkpoint, threads):
    parts = [Part(f"n{i}", (64, 64)) for i in range(20)]
    before, names = torch.get_num_threads(), threading.enumerate()
    found = list(quantise_all(checkpoint, iter(parts), TARGETS[0], threads=threads))
    assert [matrix.part for matrix in found] == parts
    for matrix in found:
        alone = quantise(checkpoint, matrix.part, TARGETS[0])
        assert torch.equal(matrix.packed.data, alone.packed.data)
    assert torch.get_num_threads() == before
    assert threading.enumerate() == names


def test_an_error_ends_the_threads(checkpoint):
    names = threading.enumerate()
    parts = [Part("bad", SHAPE), *(Part(f"n{i}", (64, 64)) for i in range(20))]
    with pytest.raises(CheckpointError, match="'bad'"):
        list(quantise_all(checkpoint, parts, TARGETS[0], threads=2))
    assert threading.enumerate() == names


def test_deviations_add_up_by_their_squares():
    both = Deviation(1.0, 100.0).plus(Deviation(3.0, 300.0))
    assert both.relative == pytest.approx(0.1)
    assert Deviation().relative == 0
