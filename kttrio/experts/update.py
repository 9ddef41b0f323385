"""Keeps the experts on the device those that are used: counts them, and has others swapped in.

What should change is decided in choice.py and done in swaps.py, a few experts at a time; what is
known at the end is kept by state.py for the next start.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kttrio.device.base import Device, Event
from kttrio.experts.block import MoEBlock
from kttrio.experts.choice import Rule, StepTokens
from kttrio.experts.state import ExpertState
from kttrio.experts.swaps import Swapper

log = logging.getLogger(__name__)


class Tally:
    """Counts on the device who is chosen. Captured steps count, too: nothing is asked of the host.

    A look at the counts comes back some steps later, so that no step waits for it.
    """

    def __init__(self, blocks: Sequence[MoEBlock], device: Device) -> None:
        num_experts = blocks[0].router.num_experts
        # One more than there are experts, for choices that are none.
        shape = len(blocks), num_experts + 1
        self._device, self._num_experts = device, num_experts
        self._stream = device.open_stream("tally")
        self._counts = torch.zeros(shape, dtype=torch.int32, device=device.where)
        self._taken = torch.zeros_like(self._counts)
        self._seen = device.pinned(*shape, dtype=torch.int32)
        self._one = torch.ones(1, dtype=torch.int32, device=device.where)
        self._event: Event | None = None
        for block, row in zip(blocks, self._counts, strict=True):
            block.listeners.append(partial(self._listen, row))

    @property
    def is_looking(self) -> bool:
        """A look is on its way."""
        return self._event is not None

    def look(self) -> None:
        """Ask for what was counted since the last look."""
        self._taken.copy_(self._counts)
        self.forget()
        self._stream.wait(self._device.main.record())
        self._stream.run(lambda: self._seen.copy_(self._taken, non_blocking=True))
        self._event = self._stream.record()

    def seen(self) -> Tensor | None:
        """What was asked for, [layers, experts] int32 on the host, once; None: not yet."""
        if self._event is None or not self._event.is_done:
            return None
        self._event.synchronize()
        self._event = None
        return self._seen[:, : self._num_experts].clone()

    def forget(self) -> None:
        """Count from zero."""
        self._counts.zero_()

    def _listen(self, row: Tensor, ids: Tensor) -> None:
        places = ids.flatten().long().remainder_(len(row))
        row.scatter_add_(0, places, self._one.expand(len(places)))


class Updater:
    """What happens to the placement of experts between two steps. Never fails a step."""

    def __init__(self, tally: Tally, rule: Rule, swapper: Swapper, state: ExpertState) -> None:
        self._tally, self._rule, self._swapper, self._state = tally, rule, swapper, state
        self._has_failed = False

    @property
    def num_swaps(self) -> int:
        """Since the start."""
        return self._swapper.num_done

    def between_steps(self, step: StepTokens) -> None:
        """Called after a step that did not fail, before the next one begins, and not while a long
        prompt has passed some layers and not others: counts of layers could not be compared then,
        and what is on its way through the ring must stay where it is."""
        if self._has_failed:
            return
        try:
            self._count(step)
            self._swap()
        except Exception:
            self._has_failed = True
            self._swapper.abandon()
            log.exception("the experts on the device stay as they are from now on: a swap failed")

    def save(self) -> Path:
        """Keep what is known for the next start. From any thread. OSError."""
        self._state.write(self._rule.counts)
        return self._state.path

    def close(self) -> None:
        """End the swaps and their thread, and keep what is known. Twice is fine."""
        self._swapper.close()
        if not self._rule.counts.any():
            return
        try:
            log.info("the experts in use are kept in %s", self.save())
        except OSError as error:
            log.warning("what is known of the experts in use is lost: %s", error)

    def _count(self, step: StepTokens) -> None:
        wants = self._rule.wants(step)
        if wants and not self._tally.is_looking:
            self._tally.look()
        elif self._rule.drops:
            self._tally.forget()
        if (counts := self._tally.seen()) is not None:
            self._rule.add(counts)

    def _swap(self) -> None:
        if self._swapper.is_idle:
            wanted = self._rule.choose(self._swapper.mask, self._swapper.num_lanes)
            self._swapper.begin(wanted)
        self._swapper.advance()
