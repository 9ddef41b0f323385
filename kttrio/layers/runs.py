"""How a step's sequences advance through recurrent layers.

Sequences meet only as entries of a batch dimension: neither convolution nor state crosses a border.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kttrio.layers.batch import Batch, sent

CHUNK = 64  # tokens that the chunked form takes at once
MAX_TOGETHER = 1024  # tokens, padding included, that meet the recurrence at a time


@dataclass(frozen=True, slots=True)
class Lanes:
    """Sequences that advance together from their slots."""

    slots: Tensor  # [n]
    fresh: Tensor | None  # [n] bool, True where the slot holds garbage; None: nowhere


@dataclass(frozen=True, slots=True)
class Run:
    """Lanes of several tokens, padded to a common length."""

    lanes: Lanes
    rows: Tensor  # [n, length] of the batch; padding repeats the lane's last token
    padding: Tensor  # [n, length] bool
    lengths: Tensor  # [n]
    drafting: bool  # all tokens of a lane but the first are drafts: its state must wait for them


@dataclass(frozen=True, slots=True)
class RunIndex:
    """How a step's sequences advance; built once and used by every recurrent layer."""

    decodes: Lanes | None  # the first `num_decodes` rows
    num_decodes: int
    runs: tuple[Run, ...]
    order: Tensor | None  # [tokens] each token's row in the outputs; None: as it stands


def index_runs(batch: Batch) -> RunIndex:
    """Decodes as one group, those with drafts as another; longer sequences grouped by their number
    of chunks, a bounded number of tokens together."""
    decodes = _lanes(batch, range(batch.num_decodes)) if batch.num_decodes else None
    alike: defaultdict[tuple[bool, int], list[int]] = defaultdict(list)
    for sequence in range(batch.num_decodes, len(batch.lengths)):
        drafting = bool(batch.num_drafts) and batch.num_drafts[sequence] > 0
        alike[drafting, -(-batch.lengths[sequence] // CHUNK)].append(sequence)
    if not alike:
        return RunIndex(decodes, batch.num_decodes, (), None)
    runs = tuple(
        _run(batch, part, drafting)
        for (drafting, chunks), group in alike.items()
        for part in ([group] if drafting else _parts(group, MAX_TOGETHER // (chunks * CHUNK)))
    )
    order = torch.arange(batch.num_tokens, device=batch.token_ids.device)
    written = batch.num_decodes
    for run in runs:
        real = ~run.padding.flatten()
        order[run.rows.flatten()[real]] = written + real.nonzero().squeeze(1)
        written += run.rows.numel()
    return RunIndex(decodes, batch.num_decodes, runs, order)


def _parts(group: list[int], size: int) -> Iterator[list[int]]:
    size = max(size, 1)
    return (group[first : first + size] for first in range(0, len(group), size))


def _lanes(batch: Batch, sequences: range | list[int]) -> Lanes:
    if batch.is_static:
        return Lanes(batch.slots, batch.positions == 0)
    fresh = [batch.starts[sequence] == 0 for sequence in sequences]
    device = batch.slots.device
    return Lanes(
        slots=batch.slots[sent(sequences, device)],
        fresh=sent(fresh, device) if any(fresh) else None,
    )


def _run(batch: Batch, sequences: list[int], drafting: bool) -> Run:
    device = batch.slots.device
    lengths = sent([batch.lengths[s] for s in sequences], device)
    starts = batch.offsets
    offsets = sent([starts[s] for s in sequences], device)
    longest = max(batch.lengths[s] for s in sequences)
    padded = longest if longest <= CHUNK else -(-longest // CHUNK) * CHUNK
    token = torch.arange(padded, device=device)
    return Run(
        lanes=_lanes(batch, sequences),
        rows=offsets[:, None] + torch.minimum(token, lengths[:, None] - 1),
        padding=token >= lengths[:, None],
        lengths=lengths,
        drafting=drafting,
    )
