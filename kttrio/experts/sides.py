"""Both sides of all layers: slots, tables and buffers, taken once for the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from kttrio import native
from kttrio.experts.division import Division, common_shape
from kttrio.experts.feeders import Feeders
from kttrio.experts.formats import ExpertPlan
from kttrio.experts.handoff import Handoff, HandoffShape, HostSide
from kttrio.experts.hybrid import DeviceSide, HybridExperts
from kttrio.experts.passing import Passing, Streaming
from kttrio.experts.rates import measure
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
    ) -> None:
        """ConfigError where layers are not alike enough to share slots."""
        where = division.device.where
        self.division = division
        self.slots: ExpertSlots | None = None
        if division.num_slots:
            shape = common_shape(division, plan, maps)
            self.slots = ExpertSlots(shape, division.num_slots, device=where)
        self.residencies = [Residency(weights.num_experts, device=where) for weights in maps]
        self.handoff = Handoff(handoff, division.device)
        self.ring: Ring | None = None

    def take(self, layer: int, expert: int, matrices: Matrices) -> bool:
        """Copy an expert into its slot; False for one that belongs on the host.

        ValueError for weights or scales that are not finite, as the library refuses them.
        """
        slot = self.division.residents(layer).get(expert)
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

    def join(
        self, hosts: Sequence[native.ExpertLayer], *, pool_threads: int
    ) -> list[HybridExperts]:
        """All layers, once every expert is where it belongs; what the ring is worth is measured."""
        streaming = self._open_ring(hosts, pool_threads)
        passing = [
            None
            if streaming is None or layer >= len(self.division.mask)
            else Passing(streaming, host, self.residencies[layer])
            for layer, host in enumerate(hosts)
        ]
        for one, following in pairwise(passing):
            if one is not None:
                one.follower = following
        return [self._layer(layer, hosts[layer], way) for layer, way in enumerate(passing)]

    def close(self) -> None:
        """End the ring's threads. Twice is fine."""
        if self.ring is not None:
            self.ring.close()

    def _open_ring(
        self, hosts: Sequence[native.ExpertLayer], pool_threads: int
    ) -> Streaming | None:
        """None without one, and where no expert could pass through it."""
        division = self.division
        absent = [residency.absent for residency in self.residencies[: len(division.mask)]]
        layer = max(range(len(absent)), key=lambda layer: len(absent[layer]))
        if self.slots is None or not division.num_ring_slots or not absent[layer]:
            return None
        feeders = Feeders(self.slots, division.device, pool_threads=pool_threads)
        self.ring = Ring(feeders, division.ring, num_experts=division.mask.shape[1])
        dtype = self.handoff.shape.dtype
        return Streaming(self.ring, measure(self.ring, hosts[layer], absent[layer], dtype=dtype))

    def _layer(
        self, layer: int, host: native.ExpertLayer, passing: Passing | None
    ) -> HybridExperts:
        lanes = self.handoff.lanes
        return HybridExperts(
            HostSide(host, self.handoff, lanes[layer % len(lanes)]),
            self._device_side(layer),
            num_deferred=self.division.num_deferred(layer),
            passing=passing,
        )

    def _device_side(self, layer: int) -> DeviceSide | None:
        residency, division = self.residencies[layer], self.division
        changes = division.num_spare_slots > 0 and layer < len(division.mask)
        if self.slots is None or not (changes or residency.num_resident):
            return None
        return DeviceSide(residency, self.slots, division.device)
