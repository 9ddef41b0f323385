from __future__ import annotations

import pytest
import torch

from kttrio.config import ConfigError
from kttrio.device.host import HostDevice
from kttrio.experts.division import Division, common_shape
from kttrio.experts.formats import ExpertPlan
from kttrio.experts.slots import SlotShape
from kttrio.weights.loader import ExpertWeights
from kttrio.weights.quantize import Target

MASK = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
MAPS = [ExpertWeights("{}g", "{}u", "{}d", 4, 64, 96)] * 4


@pytest.fixture
def division():
    return Division(HostDevice(), MASK, num_ring_slots=5, num_spare_slots=2, max_deferred=3)


def test_slots_are_given_out_in_the_masks_order_then_spare_ones_then_the_rings(division):
    assert division.num_resident == 3
    assert [division.residents(layer) for layer in range(4)] == [{1: 0, 3: 1}, {}, {0: 2}, {}]
    assert list(division.spare) == [3, 4]
    assert list(division.ring) == [5, 6, 7, 8, 9]
    assert division.num_slots == 10


def test_a_division_without_room_beside_the_residents_has_none(division):
    division = Division(division.device, MASK)
    assert (list(division.spare), list(division.ring), division.num_slots) == ([], [], 3)


def test_the_last_layer_and_the_one_for_drafts_defer_nothing(division):
    assert [division.num_deferred(layer) for layer in range(4)] == [3, 3, 0, 0]


def plan(*held):
    return ExpertPlan(stored=held, held=held, activations=("float32",) * len(held))


def test_all_layers_share_the_slots_but_the_one_for_drafts(division):
    int4, bf16 = Target("int4", 64), Target("bf16", 0)
    shape = common_shape(division, plan(int4, int4, int4, bf16), MAPS)
    assert shape == SlotShape(64, 96, int4)
    with pytest.raises(ConfigError, match=r"some are int4 and others bf16; .*--kt-method int4"):
        common_shape(division, plan(int4, bf16, int4, bf16), MAPS)
