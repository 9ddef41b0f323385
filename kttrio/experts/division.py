"""How experts are divided between the device and the host: what was decided, nothing of it done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kttrio.config import ConfigError
from kttrio.device.base import Device
from kttrio.experts.formats import ExpertPlan
from kttrio.experts.slots import SlotShape
from kttrio.weights.loader import ExpertWeights


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """Which experts begin on the device, and what room there is beside them.

    `mask` has a row for each layer of the expert map but the one for drafts, whose experts all
    stay on the host. Slots are given out in the mask's order; behind them come the spare ones and
    last the ring's.
    """

    device: Device
    mask: Tensor  # [layers with experts, experts] bool on the host
    num_ring_slots: int = 0
    """For experts that pass through the device in prefill; 0: none do."""
    num_spare_slots: int = 0
    """For experts that change places while others are still used; 0: none ever does."""
    prefill_threshold: int = 0
    """Prompts of so many tokens pass layer by layer; 0: none."""
    max_deferred: int = 0
    """Experts of a token, on the host and of little weight, whose result may come a layer late."""

    @property
    def num_resident(self) -> int:
        return int(self.mask.sum())

    @property
    def num_slots(self) -> int:
        """Room for so many experts is taken on the device."""
        return self.num_resident + self.num_spare_slots + self.num_ring_slots

    @property
    def ring(self) -> range:
        """The ring's slots."""
        return range(self.num_slots - self.num_ring_slots, self.num_slots)

    @property
    def spare(self) -> range:
        """Slots that nobody has in the beginning."""
        return range(self.num_resident, self.num_resident + self.num_spare_slots)

    def residents(self, layer: int) -> dict[int, int]:
        """Experts of a layer that begin on the device, and the slot of each."""
        if layer >= len(self.mask):
            return {}
        first = int(self.mask[:layer].sum())
        experts = self.mask[layer].nonzero().flatten().tolist()
        return {expert: first + place for place, expert in enumerate(experts)}

    def num_deferred(self, layer: int) -> int:
        """How many of a token's experts may come late: none of the last layer's, as there is no
        later one, and none of the layer's for drafts."""
        return self.max_deferred if layer < len(self.mask) - 1 else 0


def common_shape(division: Division, plan: ExpertPlan, maps: Sequence[ExpertWeights]) -> SlotShape:
    """The shape of all slots; ConfigError where layers differ in it."""
    shapes = [
        SlotShape.of(weights, held)
        for weights, held in zip(maps[: len(division.mask)], plan.held, strict=False)
    ]
    others = {shape.target.form for shape in shapes if shape != shapes[0]}
    if others:
        raise ConfigError(
            f"experts on the device must be alike in all layers, but some are "
            f"{shapes[0].target.form} and others {'+'.join(sorted(others))}; bring them into one "
            "format with --kt-method int4, or leave all on the CPU with --device cpu and without "
            "--kt-num-gpu-experts"
        )
    return shapes[0]
