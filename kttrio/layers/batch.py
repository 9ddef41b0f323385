"""The tensors of one step, as every layer sees them. No model, no cache, no expert lives here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Tokens of images: what they are embedded as."""

    rows: Tensor  # [n] int64, of the batch
    features: Tensor  # [n, hidden]


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of all sequences of a step, laid end to end: `tokens` rows, `sequences` runs.

    The `num_decodes` sequences of one token come first, so that layers can treat them as one
    dense batch; the longer ones follow. All tensors lie on the model's device; `lengths` and
    `starts` are plain integers because kernels and loops need them on the host. Only a step that
    is captured does without `starts`: see `decode_batch`.
    """

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64, position of each token in its sequence
    slots: Tensor  # [sequences] int64, row of each sequence in the recurrent caches
    page_table: Tensor  # [sequences, pages] int64, padded with page 0
    kv_index: Tensor  # [tokens] int64, page * page_size + offset: where each token's KV is written
    starts: tuple[int, ...]  # tokens each sequence had before this step; 0: its slot holds garbage;
    # (): all decode, and only the device knows where, by `positions`
    lengths: tuple[int, ...]  # tokens of each sequence in this step
    page_size: int  # tokens per page
    num_decodes: int  # sequences of length 1 at the front (new ones of length 1 count too)
    num_drafts: tuple[int, ...] = ()  # of each sequence, at its end; (): there are none
    rope_positions: Tensor | None = None  # [3, tokens] int64: time, row and column, or [tokens]
    # where these are one; None: no sequence has an image, and all three are `positions`
    images: ImageRows | None = None
    live: Tensor | None = None  # [tokens] bool: who is not there to pad the batch; None: all are

    @property
    def is_static(self) -> bool:
        """Nothing of it but its shapes is known to the host."""
        return not self.starts

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each sequence, and the number of rows at the end."""
        rows = [0]
        for length in self.lengths:
            rows.append(rows[-1] + length)
        return tuple(rows)


def sent(values: Sequence[object], device: torch.device) -> Tensor:
    """Integers of the host, or truth values if there are any, as a tensor int64 or bool. Nobody
    waits for the copy; of lists that torch makes tensors of, the host waits until the device has
    done all it was given before."""
    dtype = None if values else torch.int64
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def decode_batch(
    token_ids: Tensor, positions: Tensor, slots: Tensor, page_table: Tensor, *, page_size: int
) -> Batch:
    """One token of each sequence, described by tensors alone: int64, [sequences], and the pages
    [sequences, pages] as wide as any will be.

    What is computed of it is a fixed row of operations on tensors of fixed shapes, so that it can
    be captured once and replayed with other values in them. A position of 0 begins a sequence. A
    row that pads the batch stands at position 0, with a slot and a page that are nobody's.
    """
    page = page_table.gather(1, (positions // page_size).unsqueeze(1)).squeeze(1)
    return Batch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        page_table=page_table,
        kv_index=page * page_size + positions % page_size,
        starts=(),
        lengths=(1,) * len(token_ids),
        page_size=page_size,
        num_decodes=len(token_ids),
    )
