"""How much of what tokens choose the experts on the device serve."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Hits:
    """Choices that the device served, counted there, over all choices, counted here."""

    def __init__(self, served: Sequence[Tensor], *, choices: int) -> None:
        """`served` [1] int64 on the device, for each layer that serves some; they begin anew.
        `choices`: of a token, in all layers."""
        self._served, self._choices = [count.zero_() for count in served], choices
        self.num_tokens = 0
        """That steps have computed."""

    def report(self) -> dict[str, object]:
        """The share of choices, once there were some. Waits for the device."""
        if not self.num_tokens:
            return {}
        share = sum(map(int, self._served)) / (self.num_tokens * self._choices)
        return {"served_by_device_experts": round(share, 4)}
