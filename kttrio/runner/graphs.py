"""Decode steps as captured graphs: one replay in the place of some thousand launches.

There is a graph for each of some numbers of rows; a step takes the smallest that is large enough,
and pads. All of them read the same tensors, which each step fills. Drafts, tokens of images and
whatever looks at a step while it runs have plain steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kttrio.device.base import Device, Graph
from kttrio.layers.batch import Batch, decode_batch
from kttrio.layers.cache import LayerCache


class GraphModel(Protocol):
    """What is captured of a model."""

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor: ...


class GraphRoom(NamedTuple):
    """Which caches a graph is made for."""

    page_size: int
    max_pages: int
    """Of a sequence."""
    spare_page: int
    """Nobody's, as is the slot: rows that pad write there."""
    spare_slot: int


class _Captured(NamedTuple):
    graph: Graph
    hidden: Tensor  # [rows, hidden], where each replay leaves its result


@dataclass(frozen=True, slots=True)
class GraphWish:
    """Which decode steps are to be captured."""

    sizes: tuple[int, ...] = ()
    """Numbers of rows; (): powers of two."""
    most: int | None = None
    """Rows at most; None: as many as there may be sequences."""

    def fit(self, num_slots: int) -> tuple[int, ...]:
        """The numbers of rows to capture for so many sequences, rising. The most rows are one of
        them unless sizes are wished."""
        most = min(num_slots, self.most or num_slots)
        if self.sizes:
            return tuple(sorted({size for size in self.sizes if size <= most}))
        powers = (1 << place for place in range(most.bit_length()))
        return (*(size for size in powers if size < most), most)


class DecodeGraphs:
    """Captured where it is made. The model's caches stay where they are as long as it is used."""

    def __init__(
        self,
        model: GraphModel,
        caches: list[LayerCache],
        *,
        room: GraphRoom,
        sizes: Sequence[int],
        device: Device,
    ) -> None:
        """`sizes`: at least one. What is captured computes padding, so no sequence may be there
        whose page or slot is a spare one."""
        self._inputs = _Inputs(max(sizes), room, device.where)
        self._model, self._caches, self._device = model, caches, device
        # The largest first: the others find their memory there.
        captured = {size: self._capture(size) for size in sorted(sizes, reverse=True)}
        self._captured = dict(sorted(captured.items()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rising."""
        return tuple(self._captured)

    def forward(self, batch: Batch) -> Tensor | None:
        """As the model's, good until the next call; None where no graph is made for this batch."""
        size = self._size(batch)
        if size is None:
            return None
        self._inputs.fill(batch, size)
        captured = self._captured[size]
        captured.graph.replay()
        return captured.hidden[: batch.num_tokens]

    def _size(self, batch: Batch) -> int | None:
        if not self._inputs.holds(batch):
            return None
        return next((size for size in self._captured if size >= batch.num_tokens), None)

    def _capture(self, size: int) -> _Captured:
        """What is captured may run more than once; only the last run's result is filled again."""
        made: list[Tensor] = []
        self._inputs.pad(size)
        graph = self._device.capture(lambda: made.append(self._compute(size)))
        return _Captured(graph, made[-1])

    def _compute(self, size: int) -> Tensor:
        return self._model.forward(self._inputs.batch(size), self._caches)


class _Inputs:
    """What a decode step is told, in tensors that outlive it: one row for each sequence."""

    def __init__(self, num_rows: int, room: GraphRoom, where: torch.device) -> None:
        self._room = room
        # Each row is a page table as it may come, so whatever a kernel looks up is a page.
        shape = num_rows, room.max_pages
        self._page_table = torch.full(shape, room.spare_page, dtype=torch.int64, device=where)
        self._token_ids, self._positions, self._places, self._slots, self._numbers = (
            torch.arange(num_rows, device=where) for _ in range(5)
        )
        self._count = torch.zeros((), dtype=torch.int64, device=where)

    def holds(self, batch: Batch) -> bool:
        return (
            batch.num_decodes == len(batch.lengths)
            and batch.images is None
            and batch.page_table.shape[1] <= self._room.max_pages
        )

    def batch(self, size: int) -> Batch:
        """The first rows, whatever they will hold."""
        batch = decode_batch(
            self._token_ids[:size],
            self._positions[:size],
            self._slots[:size],
            self._page_table[:size],
            page_size=self._room.page_size,
        )
        live = self._numbers[:size] < self._count
        return replace(batch, live=live, rope_positions=self._places[:size])

    def fill(self, batch: Batch, size: int) -> None:
        """The batch's sequences, and padding up to `size`."""
        num_rows, num_pages = batch.page_table.shape
        self._token_ids[:num_rows].copy_(batch.token_ids)
        self._positions[:num_rows].copy_(batch.positions)
        # Outside images a token stands at one place on all axes.
        places = batch.positions if batch.rope_positions is None else batch.rope_positions[0]
        self._places[:num_rows].copy_(places)
        self._slots[:num_rows].copy_(batch.slots)
        self._page_table[:num_rows, :num_pages].copy_(batch.page_table)
        self._count.fill_(num_rows)
        if num_rows < size:
            self._blank(num_rows, size)

    def pad(self, size: int) -> None:
        """Nothing but padding."""
        self._count.zero_()
        self._blank(0, size)

    def _blank(self, first: int, end: int) -> None:
        """A padding row begins a sequence, on its own page and slot."""
        self._token_ids[first:end].zero_()
        self._positions[first:end].zero_()
        self._places[first:end].zero_()
        self._slots[first:end].fill_(self._room.spare_slot)
        self._page_table[first:end, :1].fill_(self._room.spare_page)
