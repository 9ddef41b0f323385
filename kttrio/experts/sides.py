"""Both sides of all layers: slots, tables and buffers, taken once for the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kttrio import native
from kttrio.experts.division import Division, common_shape
from kttrio.experts.feeders import Feeders
from kttrio.experts.formats import ExpertPlan
from kttrio.experts.handoff import Handoff, HandoffShape, HostSide
from kttrio.experts.hybrid import DeviceSide, HybridExperts
from kttrio.experts.passing import RingSide
from kttrio.experts.rates import describe, measure
from kttrio.experts.slots import ExpertSlots, Residency
from kttrio.experts.source import Matrices
from kttrio.experts.streamed import Ring
from kttrio.weights.formats.base import is_finite
from kttrio.weights.loader import ExpertWeights


class Sides:
    """What a division needs beside the layers in the library's memory."""

    def __init__(
        self,
        division: Division,
        plan: ExpertPlan,
        maps: Sequence[ExpertWeights],
        handoff: HandoffShape,
        *,
        pool_threads: int,
    ) -> None:
        """ConfigError where layers are not alike enough to share slots. `pool_threads` compute
        beside those that are started here."""
        where = division.device.where
        self.division = division
        self.slots: ExpertSlots | None = None
        if division.num_slots:
            shape = common_shape(division, plan, maps)
            self.slots = ExpertSlots(shape, division.num_slots, device=where)
        self._places = [division.residents(layer) for layer in range(len(maps))]
        self.residencies = [Residency(weights.num_experts, device=where) for weights in maps]
        self.device_sides: list[DeviceSide] = []
        self.handoff = Handoff(handoff, division.device)
        self.ring = self._open_ring(maps, pool_threads)
        self._ring_sides: list[RingSide] = []

    def _open_ring(self, maps: Sequence[ExpertWeights], pool_threads: int) -> Ring | None:
        if self.slots is None or not self.division.num_ring_slots:
            return None
        room, device = self.division.ring, self.division.device
        feeders = Feeders(self.slots, room, device, pool_threads=pool_threads)
        num_experts = max(weights.num_experts for weights in maps)
        return Ring(feeders, num_experts=num_experts)

    def close(self) -> None:
        """End the ring's threads, before the layers they read are closed."""
        if self.ring is not None:
            self.ring.close()

    def measure(self, layers: Sequence[native.ExpertLayer], dtype: torch.dtype) -> None:
        """What experts cost on each side, so that calls can be split: see costs.py."""
        divided = layers[: len(self.division.mask)]
        for layer, residency in zip(divided, self.residencies, strict=False):
            if self.ring is not None and residency.absent:
                self.ring.rates = measure(self.ring, layer, residency.absent, dtype=dtype)
                return

    @property
    def facts(self) -> dict[str, str]:
        """For people."""
        if self.ring is None or self.ring.rates is None:
            return {}
        return {"rates": describe(self.ring.rates, self.ring.slots.shape.nbytes)}

    def take(self, layer: int, expert: int, matrices: Matrices) -> bool:
        """Copy an expert into its slot; False for one that belongs on the host.

        ValueError for weights or scales that are not finite, as the library refuses them.
        """
        slot = self._places[layer].get(expert)
        if slot is None or self.slots is None:
            return False
        for name, packed in matrices._asdict().items():
            if not is_finite(packed):
                raise ValueError(
                    f"{name} has weights or scales that are not a finite number; the checkpoint "
                    "is damaged"
                )
        self.slots.slot(slot).copy_(matrices)
        self.residencies[layer].place(expert, slot)
        return True

    def join(self, layer: int, host: native.ExpertLayer) -> HybridExperts:
        """A layer whose experts are all where they belong."""
        return HybridExperts(
            self._host_side(layer, host),
            self._device_side(layer),
            self._ring_side(layer, host),
            max_tokens=self.handoff.shape.max_tokens,
            num_deferred=self.division.num_deferred(layer),
        )

    def _host_side(self, layer: int, host: native.ExpertLayer) -> HostSide | None:
        if not (self._changes(layer) or self.residencies[layer].absent):
            return None
        lanes = self.handoff.lanes
        return HostSide(host, self.handoff, lanes[layer % len(lanes)])

    def _device_side(self, layer: int) -> DeviceSide | None:
        residency = self.residencies[layer]
        if self.slots is None or not (self._changes(layer) or residency.num_resident):
            return None
        side = DeviceSide(residency, self.slots, self.division.device)
        self.device_sides.append(side)
        return side

    def _changes(self, layer: int) -> bool:
        """Its experts may come to live elsewhere."""
        return self.division.num_spare_slots > 0 and layer < len(self.division.mask)

    def _ring_side(self, layer: int, host: native.ExpertLayer) -> RingSide | None:
        if self.ring is None or layer >= len(self.division.mask):
            return None
        side = RingSide(self.ring, host, self.residencies[layer])
        if self._ring_sides:
            self._ring_sides[-1].next = side
        self._ring_sides.append(side)
        return side
