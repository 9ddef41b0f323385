"""Who computes a recurrent layer's recurrence: torch, or kernels."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kttrio.layers.backend import Backend
from kttrio.layers.delta_rule import DeltaRule, Heads
from kttrio.layers.gather import Gather
from kttrio.layers.runs import Lanes


class Recurrence(Protocol):
    def decode(self, heads: Heads, states: Tensor, lanes: Lanes) -> Tensor:
        """A few tokens of each lane, from its slot of `states` [slots, heads, key_dim, value_dim]:
        their outputs [n, length, heads, value_dim]. The slot takes in the first token only; those
        behind it are drafts."""
        ...

    def chunks(self, heads: Heads, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and the new state of longer runs. A length over `CHUNK` is a multiple of it;
        padding has key 0 and decay 0. `state` [n, heads, key_dim, value_dim] may be overwritten."""
        ...


def open_recurrence(backend: Backend, gather: Gather) -> Recurrence:
    """ImportError where Triton is asked for and not installed."""
    if backend == "torch":
        return DeltaRule(gather)
    from kttrio.layers.triton import gdn

    return gdn
