"""One layer's experts of the host on their way through the ring: who is to pass, and for what.

The ring itself is in streamed.py, what is worth it in costs.py.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from kttrio import native
from kttrio.experts.costs import split
from kttrio.experts.routing import Routing
from kttrio.experts.slots import NOWHERE, Residency
from kttrio.experts.streamed import Part, Ring
from kttrio.layers.batch import sent

LEAST_TOKENS = 64
"""With fewer in a call it is not worth waiting to see which experts they chose."""


class RingSide:
    """The experts of one layer that may pass through the ring."""

    def __init__(self, ring: Ring, layer: native.ExpertLayer, residency: Residency) -> None:
        self._ring, self._layer, self.residency = ring, layer, residency
        self.next: RingSide | None = None
        """The layer that a long prompt comes to after this one."""

    def choose(self, ids: Tensor) -> Passing | None:
        """Which experts of the host had better pass, for a call whose choices are `ids`.

        Depends on the choices and on rates that are measured once, but for one thing: while a long
        prompt has the ring, all others leave it alone.
        """
        ring = self._ring
        if ring.rates is None or ring.is_busy or ring.device.is_capturing:
            return None
        if len(ids) < LEAST_TOKENS:
            return None
        experts = split(self._counts(ids), self.residency.mask, ring.rates).sent
        return Passing(self, experts, ids) if experts else None

    def hit(self, ids: Tensor) -> list[int]:
        """All experts of the host among the choices."""
        chosen = (self._counts(ids) > 0) & ~self.residency.mask
        return _numbers(chosen)

    def stream(self, experts: Sequence[int], x: Tensor, parts: Sequence[Part]) -> Generator[None]:
        """See `Ring.stream`."""
        return self._ring.stream(self._layer, experts, x=x, parts=parts)

    def prefetch(self, experts: Sequence[int]) -> None:
        """Begin with their copies."""
        self._ring.prefetch(self._layer, experts)

    def prefetch_next(self) -> None:
        """Let copies for the next layer run under what comes before it."""
        if self.next is not None:
            self.next.prefetch(self.next.residency.absent)

    def _counts(self, ids: Tensor) -> Tensor:
        """Choices of each expert, [experts] on the host: waits for the device, once."""
        places = ids.flatten().long() + 1  # the first are those that are skipped
        counts = places.new_zeros(self._layer.num_experts + 1)
        return counts.scatter_add_(0, places, torch.ones_like(places))[1:].cpu()


class Passing:
    """Experts that pass for one call, and its choices [tokens, top_k] of the host's."""

    def __init__(self, side: RingSide, experts: Sequence[int], ids: Tensor) -> None:
        self._side, self._experts, self._ids = side, experts, ids
        self.left = ids.masked_fill(torch.isin(ids, sent(experts, ids.device)), NOWHERE)
        """The choices without theirs."""

    def sum(self, x: Tensor, weights: Tensor) -> Tensor:
        """Their weighted sum, [tokens, hidden] float32."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        part = Part(Routing(self._ids, weights), out)
        for _ in self._side.stream(self._experts, x, [part]):
            pass
        return out


def _numbers(which: Tensor) -> list[int]:
    found: list[int] = torch.nonzero(which).flatten().tolist()
    return found
