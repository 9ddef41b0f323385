from __future__ import annotations

import pytest
import torch

from kttrio import native
from kttrio.experts.slots import ExpertSlots, Residency, SlotShape, pinned_expert
from kttrio.experts.source import Matrices
from kttrio.weights.formats import base as formats
from kttrio.weights.loader import ExpertWeights
from kttrio.weights.quantize import Target

CPU = torch.device("cpu")
HIDDEN, INNER = 160, 96
TARGETS = [Target(name, group) for name in formats.names() for group in formats.find(name).GROUPS]


def random_expert(shape):
    form, group = formats.find(shape.target.form), shape.target.group
    wide = (shape.intermediate_size, shape.hidden_size)
    return Matrices(*(form.quantize(torch.randn(s), group) for s in (wide, wide, wide[::-1])))


def tensors(matrices):
    return [t for packed in matrices for t in packed if t is not None]


def same(one, other):
    """Bit for bit: float8 has no comparison of its own."""
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@pytest.fixture(params=TARGETS, ids=lambda target: f"{target.form}-{target.group}")
def shape(request):
    return SlotShape(HIDDEN, INNER, request.param)


def test_a_slot_has_the_shape_and_size_of_a_stored_expert(shape):
    expert = random_expert(shape)
    for room, tensor in zip(tensors(shape.outline()), tensors(expert), strict=True):
        assert (room.shape, room.dtype) == (tensor.shape, tensor.dtype)
    assert shape.nbytes == sum(tensor.nbytes for tensor in tensors(expert))
    slots = ExpertSlots(shape, 5, device=CPU)
    assert slots.nbytes == sum(tensor.nbytes for tensor in tensors(slots.stacks))


def test_the_shape_of_a_layer():
    weights = ExpertWeights("{}g", "{}u", "{}d", 8, HIDDEN, INNER)
    assert SlotShape.of(weights, Target("int4", 64)) == SlotShape(HIDDEN, INNER, Target("int4", 64))


def test_an_expert_goes_to_the_device_and_back_to_the_host_without_loss(shape):
    expert = random_expert(shape)
    slots = ExpertSlots(shape, 3, device=CPU)
    with native.Pool(threads=1) as pool:
        layer = native.ExpertLayer(
            pool,
            num_experts=2,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            weight_format=shape.target.form,
            group_size=shape.target.group,
            activation="float32",
            max_tokens=4,
            max_top_k=1,
        )
        slots.slot(1).copy_(expert)
        slots.slot(1).pack_into(layer, 0)
        slots.slot(2).unpack_from(layer, 0)
        layer.close()
    assert same(slots.slot(2), expert)


class Pinning:
    """A device of which only pinned memory is asked for."""

    def pinned(self, *shape, dtype):
        return torch.zeros(shape, dtype=dtype)


def test_an_expert_in_pinned_memory_has_the_same_shape(shape):
    expert = pinned_expert(shape, Pinning())
    expert.copy_(stored := random_expert(shape))
    assert same(expert, stored)


def test_slots_are_views_of_the_stacks(shape):
    slots = ExpertSlots(shape, 3, device=CPU)
    others = [slots.slot(0), slots.slot(2)]
    for slot in others:
        slot.copy_(random_expert(shape))
    before = [[tensor.clone() for tensor in tensors(slot)] for slot in others]
    slots.slot(1).copy_(random_expert(shape))
    for slot, kept in zip(others, before, strict=True):
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(tensors(slot), kept, strict=True)
        )
    assert slots.stacks.down.data.shape[0] == 3


def test_there_is_no_slot_before_the_first_or_behind_the_last():
    slots = ExpertSlots(SlotShape(HIDDEN, INNER, Target("bf16", 0)), 3, device=CPU)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"slot {index} of 3"):
            slots.slot(index)


def test_all_experts_are_on_the_host_until_they_are_placed():
    residency = Residency(4, device=CPU)
    assert residency.slot_of.tolist() == residency.host_slot_of.tolist() == [-1] * 4
    assert residency.num_resident == 0


def test_tables_change_in_place():
    residency = Residency(4, device=CPU)
    held = residency.slot_of, residency.host_slot_of
    residency.place(2, 7)
    residency.place(0, 3)
    residency.evict(0)
    residency.place(3, 3)
    for table in held:
        assert table.tolist() == [-1, -1, 7, 3]
        assert table.dtype is torch.int32
    assert residency.mask.tolist() == [False, False, True, True]
    assert residency.num_resident == 2


def test_skipped_choices_have_no_slot_even_where_the_last_expert_has_one():
    residency = Residency(4, device=CPU)
    residency.place(3, 5)
    ids = torch.tensor([[3, -1], [0, 3]], dtype=torch.int32)
    assert residency.slots(ids).tolist() == [[5, -1], [-1, 5]]
    assert residency.slots(ids).dtype is torch.int32
