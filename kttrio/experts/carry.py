"""What deferred experts owe: results of one MoE layer that are added in the next one.

A carry belongs to one pass through a model. It goes from layer to layer and is closed at the pass's
end, so that a pass that fails leaves nothing to another one.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from torch import Tensor


class Owed(Protocol):
    """Results on their way."""

    def collect(self) -> None:
        """Let the main stream wait for them. Once, whatever has gone wrong."""
        ...

    @property
    def rows(self) -> Tensor:
        """[tokens, hidden] on the device, once they are collected; to be added at once, for the
        next layers come to the same memory."""
        ...


class Rows(NamedTuple):
    """Results that are there. `Owed`."""

    rows: Tensor

    def collect(self) -> None:
        """There is nothing to wait for."""


class Due:
    """What must be there at the end of a layer. It is collected there, whatever has gone wrong."""

    def __init__(self) -> None:
        self._owed: list[Owed] = []

    def add(self, owed: Owed) -> None:
        self._owed.append(owed)

    @property
    def rows(self) -> list[Tensor]:
        """In the order in which they were added, after the end."""
        return [owed.rows for owed in self._owed]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with ExitStack() as all_of_them:
            for owed in reversed(self._owed):
                all_of_them.callback(owed.collect)


class Carry:
    """Between the MoE layers of one pass; see `Division.max_deferred`."""

    def __init__(self) -> None:
        self._owed: Owed | None = None

    def owe(self, owed: Owed) -> None:
        """The next MoE layer is to collect and add this."""
        self._owed = owed

    def take(self) -> Owed | None:
        """What the MoE layer before owes."""
        owed, self._owed = self._owed, None
        return owed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop what a pass that failed left: only then is there something."""
        owed = self.take()
        if owed is not None:
            owed.collect()
