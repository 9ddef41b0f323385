"""Room for experts on the device, and which expert has which of it.

A slot holds one expert, row major and as the checkpoint stores it: what the native library takes
and gives bit for bit, so that an expert can go both ways. Who computes them is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kttrio.device.base import Device
from kttrio.experts.source import Matrices
from kttrio.weights.formats import base as formats
from kttrio.weights.loader import ExpertWeights
from kttrio.weights.quantize import Target

NOWHERE = -1
"""The slot of an expert that has none: it lives on the host."""

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class SlotShape:
    """What an expert takes: slots of one shape serve every layer that has it."""

    hidden_size: int
    intermediate_size: int
    target: Target

    @classmethod
    def of(cls, weights: ExpertWeights, held: Target) -> SlotShape:
        """That of a layer's experts."""
        return cls(weights.hidden_size, weights.intermediate_size, held)

    @property
    def nbytes(self) -> int:
        """Of one expert."""
        return sum(packed.nbytes for packed in self.outline())

    def outline(self) -> Matrices:
        """An expert without memory: its dtypes and shapes."""
        form, group = formats.find(self.target.form), self.target.group
        wide = (self.intermediate_size, self.hidden_size)
        shapes = (wide, wide, wide[::-1])
        return Matrices(*(form.empty(shape, group, _META) for shape in shapes))


def pinned_expert(shape: SlotShape, device: Device) -> Matrices:
    """Host memory for an expert on its way to or from the device, uninitialised."""
    return shape.outline().map(lambda tensor: device.pinned(*tensor.shape, dtype=tensor.dtype))


class ExpertSlots:
    """So many experts side by side, uninitialised: a tensor for each of an expert's.

    `stacks` are its matrices with a leading dimension, that of the slots.
    """

    def __init__(self, shape: SlotShape, num_slots: int, *, device: torch.device) -> None:
        def room(tensor: Tensor) -> Tensor:
            return torch.empty(num_slots, *tensor.shape, dtype=tensor.dtype, device=device)

        self.shape, self.num_slots = shape, num_slots
        self.stacks = shape.outline().map(room)

    @property
    def nbytes(self) -> int:
        return self.num_slots * self.shape.nbytes

    def slot(self, index: int) -> Matrices:
        """The expert there: views, to be read and written."""
        if not 0 <= index < self.num_slots:
            raise IndexError(f"slot {index} of {self.num_slots}")
        return self.stacks.map(lambda stack: stack[index])


class Residency:
    """Where the experts of one layer live.

    `slot_of` [experts] int32 is on the device, `host_slot_of` the same on the host: a slot's
    number, or -1 for the host. They change in place, because captured steps hold them; so only
    between steps, once the expert is where the table is going to say, and while nobody holds them.
    """

    def __init__(self, num_experts: int, *, device: torch.device) -> None:
        # One more, never placed: what the id -1 of a skipped choice finds.
        self._table = torch.full((num_experts + 1,), NOWHERE, dtype=torch.int32, device=device)
        self.slot_of = self._table[:num_experts]
        self.host_slot_of = torch.full((num_experts,), NOWHERE, dtype=torch.int32)
        self._num_holders = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Over several steps: until it ends the tables must not change."""
        self._num_holders += 1
        try:
            yield
        finally:
            self._num_holders -= 1

    @property
    def is_held(self) -> bool:
        return self._num_holders > 0

    @property
    def num_resident(self) -> int:
        """Experts of this layer on the device."""
        return int((self.host_slot_of >= 0).sum())

    @property
    def mask(self) -> Tensor:
        """[experts] bool on the host: who lives on the device."""
        return self.host_slot_of >= 0

    @property
    def absent(self) -> list[int]:
        """The experts on the host."""
        return (~self.mask).nonzero().flatten().tolist()

    def place(self, expert: int, slot: int) -> None:
        """The expert is in that slot from the next step on."""
        self._write(expert, slot)

    def evict(self, expert: int) -> None:
        """The expert lives on the host from the next step on."""
        self._write(expert, NOWHERE)

    def slots(self, ids: Tensor) -> Tensor:
        """Of chosen experts, ids of any shape int32 on the device; -1 for those on the host and
        for skipped ones."""
        return self._table[ids.long()]

    def _write(self, expert: int, slot: int) -> None:
        self.host_slot_of[expert] = slot
        self.slot_of[expert].fill_(slot)  # to assign it would be a copy that the host waits for
