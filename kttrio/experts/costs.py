"""What experts cost here and there, and which ones a call therefore sends to the device.

Pure arithmetic on counts and rates. The rates are measured once, at start (measure.py); so the same
tokens are always split in the same way, whatever else goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds. A choice is one token's choice of one expert."""

    host_expert: float
    """To read an expert that was chosen, with all threads of the pool."""
    host_choice: float
    """To multiply it with each token that chose it."""
    send_expert: float
    """From the library's memory into a slot of the device, in a row of many."""
    device_expert: float
    device_choice: float

    def on_host(self, counts: Tensor) -> Tensor:
        """Of experts with so many choices, each by itself."""
        return _cost(counts, self.host_expert, self.host_choice)

    def on_device(self, counts: Tensor) -> Tensor:
        """The same for experts that are in a slot."""
        return _cost(counts, self.device_expert, self.device_choice)


class Split(NamedTuple):
    """What becomes of one call's experts."""

    sent: tuple[int, ...]
    """Experts of the host that are to be computed on the device, the most chosen first."""
    seconds: float
    """How long the call will take."""


def split(counts: Tensor, resident: Tensor, rates: Rates) -> Split:
    """The experts to send so that the slower of host and device ends soonest.

    counts [experts] of choices, `resident` [experts] bool: who is on the device anyway; both on the
    host. Host and device work side by side, and copies under the device's work. An expert's copy
    costs the same however many tokens chose it, so the most chosen ones go first. One choice more
    never makes the predicted time shorter, and never longer by more than its expert takes alone.
    """
    num_choices, experts = counts.masked_fill(resident, 0).sort(descending=True, stable=True)
    on_host, on_device = rates.on_host(num_choices), rates.on_device(num_choices)
    copies = _cost(num_choices, rates.send_expert, 0)
    anyway = rates.on_device(counts[resident]).sum()
    device = torch.maximum(_running(copies), _running(on_device) + anyway)
    host = on_host.sum() - _running(on_host)
    seconds = torch.maximum(host.clamp(min=0), device)  # by number of experts sent, from 0
    best = seconds.min()
    num_sent = int((seconds == best).nonzero()[0])
    return Split(tuple(experts[:num_sent].tolist()), best.item())


def _cost(counts: Tensor, expert: float, choice: float) -> Tensor:
    return (counts > 0).double() * expert + counts.double() * choice


def _running(seconds: Tensor) -> Tensor:
    """Sums of none, the first, the first two... [experts + 1]"""
    return torch.nn.functional.pad(seconds.cumsum(0), (1, 0))
