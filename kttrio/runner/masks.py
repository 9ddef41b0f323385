"""Masks of what may be drawn, from their makers to the logits.

They are waited for when the step's logits are under way, and cross to the device as bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kttrio.layers.batch import sent
from kttrio.plan import Chunk

_BLOCK_ELEMENTS = 2**21
NOTHING_ALLOWED = "no token may come next: what constrains the answer forbids every one"

Bits = NDArray[np.uint8]
"""[bytes]: of token i bit i % 8 of byte i // 8, for all of the model's vocabulary."""


Mask = Bits | str | None
"""None: all may be drawn; text: nothing may, and why."""


def wait_for(chunk: Chunk, *, vocab_size: int) -> tuple[Mask, ...]:
    """The masks of a chunk that has some, after its known token and after each draft; blocks until
    they are made."""
    num_places = 1 + chunk.num_drafts
    if chunk.masks is None:
        return (None,) * num_places
    try:
        masks = chunk.masks.wait()
    except RuntimeError as error:
        return (str(error),) * num_places
    if len(masks) != num_places:
        return (f"{len(masks)} masks were made for {num_places} places",) * num_places
    return tuple(_fitted(mask, vocab_size) for mask in masks)


def _fitted(mask: bytes | None, vocab_size: int) -> Mask:
    """As wide as the vocabulary: a checkpoint may have more rows than its tokenizer has tokens."""
    if mask is None:
        return None
    bits = np.zeros(-(-vocab_size // 8), dtype=np.uint8)
    given = np.frombuffer(mask, dtype=np.uint8)[: len(bits)]
    bits[: len(given)] = given
    if vocab_size % 8:
        bits[-1] &= (1 << vocab_size % 8) - 1
    return bits if bits.any() else NOTHING_ALLOWED


def forbid(logits: Tensor, masks: Mapping[int, Bits]) -> None:
    """Set to -inf, in place, what may not be drawn. logits [rows, vocab]; masks by row."""
    rows, vocab_size = sorted(masks), logits.shape[-1]
    packed = torch.from_numpy(np.stack([masks[row] for row in rows]))
    packed = packed.to(logits.device, non_blocking=True)
    bit = torch.ones(8, dtype=torch.uint8, device=logits.device)
    bit <<= torch.arange(8, dtype=torch.uint8, device=logits.device)
    for block in _blocks(len(rows), vocab_size):
        unset = (packed[block].unsqueeze(-1) & bit).eq(0).flatten(1)[:, :vocab_size]
        if len(rows) == len(logits):
            logits[block].masked_fill_(unset, -torch.inf)
        else:
            at = sent(rows[block], logits.device)
            logits[at] = logits[at].masked_fill_(unset, -torch.inf)


def _blocks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Parts of the rows small enough that the temporaries of one part stay small."""
    step = max(1, _BLOCK_ELEMENTS // vocab_size)
    return (slice(row, row + step) for row in range(0, num_rows, step))
