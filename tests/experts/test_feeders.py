"""Threads that fill slots."""

from __future__ import annotations

import pytest

from kttrio.device.host import HostDevice
from kttrio.experts.feeders import Feeders, Load, batch_size, most_staging_bytes, num_feeders
from kttrio.experts.slots import ExpertSlots, SlotShape
from kttrio.native import NativeError, Pool
from kttrio.weights.formats import base as formats
from kttrio.weights.quantize import Target
from tests.native.expert_reference import BF16, make_layer, random_experts

MIB = 2**20


@pytest.mark.parametrize(
    ("threads", "expected"), [(1, 2), (2, 2), (16, 2), (32, 4), (64, 8), (192, 8)]
)
def test_a_few_threads_feed_so_that_the_pool_keeps_its_cores(threads, expected):
    assert num_feeders(threads) == expected


@pytest.mark.parametrize(
    ("expert_bytes", "num_slots", "expected"),
    [(3 * MIB, 64, 2), (MIB, 64, 8), (MIB, 16, 2), (44 * MIB, 64, 1), (9, 4, 1), (9, 2, 1)],
)
def test_small_experts_are_copied_together_but_not_all_at_once(expert_bytes, num_slots, expected):
    assert batch_size(expert_bytes, num_slots) == expected


class Counting(HostDevice):
    num_pinned = 0

    def pinned(self, *shape, dtype):
        made = super().pinned(*shape, dtype=dtype)
        self.num_pinned += made.nbytes
        return made


@pytest.mark.parametrize("target", [Target("int4", 32), Target("fp8", 128)])
@pytest.mark.parametrize("threads", [1, 32, 300])
def test_the_plan_has_room_for_what_is_pinned(target, threads):
    shape, device = SlotShape(64, 96, target), Counting()
    feeders = Feeders(
        ExpertSlots(shape, 24, device=device.where), range(24), device, pool_threads=threads
    )
    feeders.close()
    most = most_staging_bytes(shape.nbytes, 24)
    assert device.num_pinned <= most
    assert threads < 300 or device.num_pinned == most


def test_what_is_fed_is_there_bit_for_bit_and_what_fails_says_so():
    experts = random_experts(4, 64, 96, kind=BF16, seed=1)
    device = HostDevice()
    slots = ExpertSlots(SlotShape(64, 96, Target("bf16", 0)), 24, device=device.where)
    feeders = Feeders(slots, range(24), device, pool_threads=1)
    with Pool(threads=1) as pool, make_layer(pool, experts, activation="float32") as layer:
        layer.clear_expert(2)
        given = [(3, 0, 1), (2,), (1, 0), (1, 2)]
        places = [5, 0, 20, 10]
        loads = [
            feeders.feed(Load(layer, who, where, None))
            for who, where in zip(given, places, strict=True)
        ]
        for done, who, where in zip(loads, given, places, strict=True):
            if 2 in who:
                with pytest.raises(NativeError, match="expert 2 has no weights here"):
                    done.result()
                continue
            done.result().synchronize()
            for place, expert in enumerate(who, where):
                found, wanted = slots.slot(place), experts[expert]
                for matrix, name in zip(found, ("gate", "up", "down"), strict=True):
                    stored = getattr(wanted, name).stored
                    assert matrix.data.equal(stored)
        feeders.close()
        feeders.close()


def test_every_format_has_a_size():
    for name in formats.names():
        group = formats.find(name).GROUPS[0]
        assert most_staging_bytes(SlotShape(2048, 512, Target(name, group)).nbytes, 64) < 100 * MIB
