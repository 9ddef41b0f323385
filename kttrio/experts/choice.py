"""Which experts should change sides: counts and a mask in, swaps out. Nothing is moved here.

Counts and masks are [layers, experts]; a mask is true on the device. A swap sends one expert to the
device and another back to the host, so that there are as many on the device as before. How swaps
are carried out is told in swaps.py, where the counts come from in update.py.
"""

from __future__ import annotations

from math import log
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

HALF_LIFE = 2**14
"""Tokens after which what was counted weighs half. Some long answers, so that a new topic is
followed within minutes; yet enough that the counts of hundreds of experts are no mere chance."""
MARGIN = 2.0
"""Standard deviations by which two counts must differ. Where many experts are used alike, the
luckiest would else take the place of the unluckiest again and again."""
EVERY_TOKENS = 16
"""A look at the counts costs a small copy from the device, and decides on a few swaps at most."""


class Seat(NamedTuple):
    """One expert of one layer."""

    layer: int
    expert: int


class Swap(NamedTuple):
    """Two experts that change sides."""

    promoted: Seat
    """To the device."""
    demoted: Seat
    """To the host."""


class StepTokens(NamedTuple):
    """What a step consisted of."""

    num_tokens: int
    num_prompt_tokens: int


class Rule(Protocol):
    """Decides which experts should be on the device."""

    def wants(self, step: StepTokens) -> bool:
        """Whether to look now, after this step, at what was counted since the last look."""
        ...

    @property
    def drops(self) -> bool:
        """It has no use for what was counted in the steps after which it does not look."""
        ...

    @property
    def counts(self) -> Tensor:
        """All that it knows: a new tensor whenever that changes."""
        ...

    def add(self, counts: Tensor) -> None:
        """Hear of what was counted since the last look."""
        ...

    def choose(self, mask: Tensor, limit: int) -> list[Swap]:
        """The most useful swaps now, at most so many."""
        ...


class DecayedCounts:
    """How often each expert was chosen, lately rather than long ago.

    Prefill and decode count alike, and age is measured in tokens: neither an idle hour nor the way
    in which a prompt was cut into steps changes what is known.
    """

    def __init__(self, known: Tensor, *, top_k: int, half_life: float = HALF_LIFE) -> None:
        """`known`: counts from before, which weigh at most what a long run would leave of them."""
        self._top_k, self._half_life = top_k, half_life
        most = top_k * half_life / log(2)
        self.values = known.double() * min(1.0, most / max(float(known.sum(1).max()), 1.0))

    def add(self, counts: Tensor) -> None:
        num_tokens = float(counts.sum(1).max()) / self._top_k
        self.values = self.values * 0.5 ** (num_tokens / self._half_life) + counts


class DecayedRule:
    """Those used most lately, in prefill and decode, whatever layer they are of.

    Swaps are chosen once after each look, so that their number keeps in step with that of tokens.
    """

    drops = False

    def __init__(
        self, known: DecayedCounts, *, margin: float = MARGIN, every_tokens: int = EVERY_TOKENS
    ) -> None:
        self._known = known
        self._margin, self._every_tokens = margin, every_tokens
        self._num_tokens = 0
        self._is_news = False

    @property
    def counts(self) -> Tensor:
        return self._known.values

    def wants(self, step: StepTokens) -> bool:
        self._num_tokens += step.num_tokens
        if self._num_tokens < self._every_tokens:
            return False
        self._num_tokens = 0
        return True

    def add(self, counts: Tensor) -> None:
        self._known.add(counts)
        self._is_news = True

    def choose(self, mask: Tensor, limit: int) -> list[Swap]:
        if not self._is_news:
            return []
        self._is_news = False
        return choose_swaps(self.counts, mask, limit=limit, margin=self._margin)


class LastChunkRule:
    """Those that the last large step used most, layer by layer: what SGLang's rule chooses.

    Each layer keeps its number. A step is large with so many tokens of prompts as `threshold`; the
    tokens of other requests in it count, too.
    """

    drops = True

    def __init__(self, shape: tuple[int, int], *, threshold: int) -> None:
        self.counts = torch.zeros(shape)
        self._threshold = threshold
        self._is_settled = True

    def wants(self, step: StepTokens) -> bool:
        return step.num_prompt_tokens >= self._threshold

    def add(self, counts: Tensor) -> None:
        self.counts = counts
        self._is_settled = False

    def choose(self, mask: Tensor, limit: int) -> list[Swap]:
        if self._is_settled:
            return []
        swaps = [swap for layer in range(len(mask)) for swap in self._of_layer(layer, mask, limit)]
        self._is_settled = len(swaps) <= limit
        return swaps[:limit]

    def _of_layer(self, layer: int, mask: Tensor, limit: int) -> list[Swap]:
        here = slice(layer, layer + 1)
        swaps = choose_swaps(self.counts[here], mask[here], limit=limit + 1)
        return [Swap(*(Seat(layer, seat.expert) for seat in swap)) for swap in swaps]


def choose_swaps(counts: Tensor, mask: Tensor, *, limit: int, margin: float = 0.0) -> list[Swap]:
    """The swaps that gain most, at most `limit`, over all layers; each gains something.

    An expert gives way to one whose count is higher by more than `margin` standard deviations of
    the difference of two counts like theirs.
    """
    on_device, table = mask.flatten(), counts.double().flatten()
    num_swaps = min(limit, int(on_device.sum()), int((~on_device).sum()))
    leaving = torch.where(on_device, -table, -torch.inf).topk(num_swaps)
    coming = torch.where(on_device, -torch.inf, table).topk(num_swaps)
    gains = coming.values + leaving.values
    pays = gains > margin * (coming.values - leaving.values).sqrt()
    pairs = zip(coming.indices[pays].tolist(), leaving.indices[pays].tolist(), strict=True)
    width = counts.shape[1]
    return [Swap(*(Seat(*divmod(place, width)) for place in pair)) for pair in pairs]


def swapped(mask: Tensor, swaps: list[Swap]) -> Tensor:
    """The mask once these swaps are done; a copy."""
    after = mask.clone()
    if swaps:
        promoted, demoted = torch.tensor(swaps).unbind(1)
        after[promoted.unbind(1)], after[demoted.unbind(1)] = True, False
    return after
