"""Experts of a layer that live on the host, yet are computed on the device for one call.

With many tokens of a step some of them are worth the copy; of a long prompt all are. How they get
there is told in streamed.py, which ones in costs.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kttrio import native
from kttrio.experts.costs import Rates, split
from kttrio.experts.slots import Residency
from kttrio.experts.streamed import LEAST_TOKENS, Part, Ring


class Streaming(NamedTuple):
    """What the layers that stream have in common."""

    ring: Ring
    rates: Rates


class Passing:
    """One layer's way through the ring."""

    def __init__(
        self, streaming: Streaming, layer: native.ExpertLayer, residency: Residency
    ) -> None:
        self._ring, self._rates = streaming
        self._layer, self._residency = layer, residency
        self.follower: Passing | None = None
        """The next layer that streams."""

    def pays(self, num_tokens: int) -> bool:
        """Whether to ask `choose`: it waits for the device, and somebody else may be streaming."""
        device = self._ring.device
        return num_tokens >= LEAST_TOKENS and not (self._ring.is_busy or device.is_capturing)

    def choose(self, ids: Tensor) -> tuple[int, ...]:
        """The experts of the host that a call with these choices should have on the device."""
        return split(self._count(ids), self._residency.mask, self._rates).sent

    def run(self, experts: Sequence[int], *, x: Tensor, parts: Sequence[Part]) -> Iterator[None]:
        """As `Ring.stream`."""
        return self._ring.stream(self._layer, experts, x=x, parts=parts)

    def run_all(self, ids: Tensor, *, x: Tensor, parts: Sequence[Part]) -> Iterator[None]:
        """The same for every expert of the host that is among these ids; what the next layer will
        need then begins to move."""
        hit = (self._count(ids) > 0) & ~self._residency.mask
        yield from self.run(hit.nonzero().flatten().tolist(), x=x, parts=parts)
        if self.follower is not None:
            self.follower._prefetch()

    def _prefetch(self) -> None:
        self._ring.prefetch(self._layer, self._residency.absent)

    def _count(self, ids: Tensor) -> Tensor:
        """[experts] on the host; -1 is nobody's."""
        found = torch.bincount(ids.cpu().flatten() + 1, minlength=self._layer.num_experts + 1)
        return found[1:]
