"""Swaps on real layers: at every moment an expert is, bit for bit, where its table says."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from kttrio import native
from kttrio.device.base import Device
from kttrio.device.host import HostDevice
from kttrio.experts.choice import Seat, Swap
from kttrio.experts.slots import ExpertSlots, Residency, SlotShape
from kttrio.experts.source import Matrices
from kttrio.experts.swaps import Swapper, TwoSides
from kttrio.weights.formats import base as formats
from kttrio.weights.quantize import Target
from tests.device.shuffled import ShuffledDevice

LAYERS, EXPERTS, RESIDENT, LANES = 3, 6, 2, 2
HIDDEN, INNER = 64, 32
TARGETS = [Target(name, group) for name in formats.names() for group in formats.find(name).GROUPS]
NUM_ON_HOSTS = LAYERS * (EXPERTS - RESIDENT)
BF16 = Target("bf16", 0)
STAGES = (
    (Matrices, "unpack_from"),
    (Matrices, "pack_into"),
    (Matrices, "copy_"),
    (native.ExpertLayer, "clear_expert"),
)
"""What a swap consists of."""


def bits(expert: Matrices) -> list[bytes]:
    tensors = [tensor for packed in expert for tensor in packed if tensor is not None]
    return [tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors]


class Sides:
    """Layers whose first experts are on the device and nowhere else, and all experts' own bits."""

    def __init__(self, target: Target, device: Device) -> None:
        self.device, self.shape = device, SlotShape(HIDDEN, INNER, target)
        self.slots = ExpertSlots(self.shape, LAYERS * RESIDENT + LANES, device=device.where)
        self.pool = native.Pool(threads=2)
        self.layers = [TwoSides(self._host(), self._table()) for _ in range(LAYERS)]
        self.own = {}
        for layer, sides in enumerate(self.layers):
            for expert in range(EXPERTS):
                self.own[layer, expert] = self._fill(sides, layer, expert)
        self.packed_bytes = self.layers[0].host.nbytes // (EXPERTS - RESIDENT)
        spares = range(LAYERS * RESIDENT, self.slots.num_slots)
        self.swapper = Swapper(self.layers, self.slots, spares=spares, device=device)

    def _host(self) -> native.ExpertLayer:
        return native.ExpertLayer(
            self.pool,
            num_experts=EXPERTS,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            weight_format=self.shape.target.form,
            group_size=self.shape.target.group,
            activation="float32",
            max_tokens=4,
            max_top_k=2,
        )

    def _table(self) -> Residency:
        return Residency(EXPERTS, device=self.device.where)

    def _fill(self, sides: TwoSides, layer: int, expert: int) -> list[bytes]:
        form, group = formats.find(self.shape.target.form), self.shape.target.group
        generator = torch.Generator().manual_seed(layer * EXPERTS + expert)
        sizes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
        weights = (torch.randn(size, generator=generator) for size in sizes)
        made = Matrices(*(form.quantize(weight, group) for weight in weights))
        if expert < RESIDENT:
            slot = layer * RESIDENT + expert
            self.slots.slot(slot).copy_(made)
            sides.residency.place(expert, slot)
        else:
            made.pack_into(sides.host, expert)
        return bits(made)

    def where(self, layer: int, expert: int) -> list[bytes]:
        """Its bits, found as a step finds them."""
        host, residency = self.layers[layer]
        slot = int(residency.host_slot_of[expert])
        assert slot == int(residency.slot_of[expert])
        if slot >= 0:
            return bits(self.slots.slot(slot))
        room = ExpertSlots(self.shape, 1, device=torch.device("cpu")).slot(0)
        room.unpack_from(host, expert)
        return bits(room)

    def check(self) -> None:
        for seat, own in self.own.items():
            assert self.where(*seat) == own

    def num_on_hosts(self) -> int:
        """Experts that host layers hold, twice or not."""
        return sum(host.nbytes for host, _ in self.layers) // self.packed_bytes

    def settle(self, between: Callable[[], None] = lambda: None) -> None:
        while not self.swapper.is_idle:
            self.swapper.advance()
            between()

    def swap_on(self, generator: torch.Generator, *, rounds: int = 10) -> None:
        """Any swaps, with a look at all experts whenever there is time."""
        for _ in range(rounds):
            self.swapper.begin(swaps(generator, self.swapper.mask))
            self.settle(self.check)

    def close(self) -> None:
        self.swapper.close()
        for host, _ in self.layers:
            host.close()
        self.pool.close()


@contextmanager
def sides(target: Target = BF16, device: Device | None = None) -> Iterator[Sides]:
    made = Sides(target, device or HostDevice())
    try:
        yield made
    finally:
        made.close()


def swaps(generator: torch.Generator, mask: torch.Tensor) -> list[Swap]:
    """Any that are possible, as many as there are lanes."""

    def some(mask: torch.Tensor) -> list[Seat]:
        seats = mask.nonzero()
        order = torch.randperm(len(seats), generator=generator)[:LANES]
        return [Seat(*seat) for seat in seats[order].tolist()]

    return [Swap(*pair) for pair in zip(some(~mask), some(mask), strict=True)]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.form}-{target.group}")
def test_every_expert_is_where_its_table_says_at_every_moment(target: Target) -> None:
    generator = torch.Generator().manual_seed(1)
    with sides(target) as there:
        there.swap_on(generator, rounds=12)
        assert there.swapper.num_done == 12 * LANES
        assert int(there.swapper.mask.sum()) == LAYERS * RESIDENT
        tables = torch.stack([layer.residency.mask for layer in there.layers])
        assert torch.equal(there.swapper.mask, tables)
        assert there.num_on_hosts() == NUM_ON_HOSTS, "no expert is held twice"


@pytest.mark.parametrize("seed", range(25))
def test_no_order_of_the_device_shows(seed: int) -> None:
    """Copies are as late or early as events allow, and steps go on beside them."""
    generator, device = torch.Generator().manual_seed(seed), ShuffledDevice(seed)
    with sides(device=device) as there, device.stirred():
        there.swap_on(generator, rounds=5)
        assert there.num_on_hosts() == NUM_ON_HOSTS


@pytest.mark.parametrize("seed", range(40))
def test_wherever_it_fails_every_expert_stays_in_its_place(seed: int) -> None:
    """One of the things that swaps do, any of them, goes wrong; then all else is undone."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    owner, name = dice.choice(STAGES)
    fails, real, num_calls = dice.randrange(6), getattr(owner, name), itertools.count()

    def work(*args: object) -> object:
        if next(num_calls) == fails:
            raise native.NativeError("broken")
        return real(*args)

    with sides(device=ShuffledDevice(seed)) as there:
        with patch.object(owner, name, work), pytest.raises(native.NativeError, match="broken"):
            there.swap_on(generator)
        there.swapper.abandon()
        there.check()
        assert int(there.swapper.mask.sum()) == LAYERS * RESIDENT
        there.swapper.close()
        left = int(name == "clear_expert")  # who could not be freed is still there, unused
        assert there.num_on_hosts() == NUM_ON_HOSTS + left


def test_tables_that_are_held_wait() -> None:
    with sides() as there:
        there.swapper.begin([Swap(Seat(0, 4), Seat(1, 1))])
        with there.layers[0].residency.held(), there.layers[1].residency.held():
            for _ in range(1000):
                there.swapper.advance()
            assert there.swapper.mask[:, :RESIDENT].all()
        there.settle()
        there.check()
        assert there.swapper.mask[0, 4]


def test_the_budget_moves_to_another_layer() -> None:
    with sides() as there:
        there.swapper.begin([Swap(Seat(0, 2), Seat(2, 0)), Swap(Seat(0, 3), Seat(2, 1))])
        there.settle()
        assert [layer.residency.num_resident for layer in there.layers] == [4, 2, 0]
        there.check()


def test_tables_are_changed_in_place() -> None:
    with sides() as there:
        held = [layer.residency.slot_of for layer in there.layers]
        there.swapper.begin([Swap(Seat(1, 4), Seat(1, 0))])
        there.settle()
        assert [int(table[4]) >= 0 for table in held] == [False, True, False]
        assert int(held[1][0]) == -1


def test_nobody_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """While an expert is unpacked, the thread of the steps has other things to do."""
    go_on = threading.Event()
    unpack = Matrices.unpack_from

    def slowly(self: Matrices, layer: native.ExpertLayer, expert: int) -> None:
        assert go_on.wait(10)
        unpack(self, layer, expert)

    monkeypatch.setattr(Matrices, "unpack_from", slowly)
    with sides() as there:
        there.swapper.begin([Swap(Seat(0, 4), Seat(0, 1))])
        for _ in range(5):
            there.swapper.advance()
        assert not there.swapper.is_idle
        assert there.swapper.num_lanes == LANES
        go_on.set()
        there.settle()
        there.check()


@pytest.mark.parametrize("method", ["unpack_from", "pack_into", "copy_"])
def test_what_fails_leaves_every_expert_where_it_was(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: object) -> None:
        raise native.NativeError("broken")

    with sides() as there:
        swaps = [Swap(Seat(0, 4), Seat(1, 1)), Swap(Seat(2, 4), Seat(0, 0))]
        there.swapper.begin(swaps)
        with monkeypatch.context() as patched:
            patched.setattr(Matrices, method, fail)
            with pytest.raises(native.NativeError, match="broken"):
                there.settle()
        there.swapper.abandon()
        there.check()
        assert int(there.swapper.mask[:, :RESIDENT].sum()) == LAYERS * RESIDENT
        there.swapper.close()
        assert there.num_on_hosts() == NUM_ON_HOSTS


@pytest.mark.parametrize("steps", range(5))
def test_what_is_abandoned_leaves_no_copy_and_no_thread(steps: int) -> None:
    before = set(threading.enumerate())
    with sides() as there:
        there.swapper.begin([Swap(Seat(0, 4), Seat(1, 1)), Swap(Seat(2, 4), Seat(0, 0))])
        for _ in range(steps):
            there.swapper.advance()
        there.swapper.close()
        assert set(threading.enumerate()) <= before
        there.check()
        assert there.num_on_hosts() == NUM_ON_HOSTS
        there.swapper.close()
