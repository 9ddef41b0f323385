"""Which tokens each running sequence has seen, and what that costs them.

The counts lie on the device, one row per slot, and only while a sequence that asks for penalties
holds a slot. They follow from the tokens of the chunks alone; sampled tokens are counted when they
come back as input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kttrio.layers.batch import sent
from kttrio.plan import Chunk
from kttrio.request import SamplingParams

_BLOCK_ELEMENTS = 2**21


def uses_penalties(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


class TokenCounts:
    """Prompt and output tokens of the sequences that ask for penalties."""

    def __init__(self, *, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (num_slots, vocab_size)
        self._device = device
        self._owners: set[int] = set()
        self._in_prompt: Tensor | None = None  # [slots, vocab] bool
        self._in_output: Tensor | None = None  # [slots, vocab] float32: counts, exact up to 2**24

    @property
    def allocated(self) -> bool:
        return self._in_output is not None

    def observe(self, chunks: Sequence[Chunk]) -> None:
        """Count the chunks' tokens; a chunk at start 0 forgets what its slot held before."""
        fresh = [chunk for chunk in chunks if chunk.start == 0]
        self._owners.difference_update(chunk.slot for chunk in fresh)
        begun = [chunk.slot for chunk in fresh if uses_penalties(chunk.sampling)]
        self._owners.update(begun)
        if not self._owners:
            self._in_prompt = self._in_output = None
            return
        in_prompt, in_output = self._tables()
        if begun:
            at = sent(begun, self._device)
            in_prompt[at] = False
            in_output[at] = 0.0
        owned = [chunk for chunk in chunks if chunk.slot in self._owners]
        slots, tokens = self._places([(chunk.slot, _prompt_part(chunk)) for chunk in owned])
        in_prompt[slots, tokens] = True
        slots, tokens = self._places([(chunk.slot, _output_part(chunk)) for chunk in owned])
        in_output.index_put_((slots, tokens), torch.ones_like(slots).float(), accumulate=True)

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._in_prompt is None or self._in_output is None:
            self._in_prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._in_output = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        return self._in_prompt, self._in_output

    def _places(self, parts: list[tuple[int, tuple[int, ...]]]) -> tuple[Tensor, Tensor]:
        """(slot, tokens) pairs as two index tensors of equal length."""
        lengths = [len(tokens) for _, tokens in parts]
        slots = np.repeat(np.array([slot for slot, _ in parts], dtype=np.int64), lengths)
        tokens = np.array([token for _, part in parts for token in part], dtype=np.int64)
        return (
            torch.from_numpy(slots).to(self._device, non_blocking=True),
            torch.from_numpy(tokens).to(self._device, non_blocking=True),
        )

    def penalise(self, logits: Tensor, chunks: Sequence[Chunk]) -> None:
        """Change in place the rows, one for each chunk, whose request asks for it.

        Repetition divides positive logits and multiplies negative ones, for tokens of prompt and
        output; then frequency is taken off for each time a token was output, presence once.
        """
        rows = [row for row, chunk in enumerate(chunks) if uses_penalties(chunk.sampling)]
        if not rows:
            return
        in_prompt, in_output = self._tables()
        for block in _blocks(rows, logits.shape[-1]):
            samplings = [chunks[row].sampling for row in block]
            slots = sent([chunks[row].slot for row in block], self._device)
            at = sent(block, self._device)
            counts = in_output[slots]
            seen = in_prompt[slots] | (counts > 0)
            repetition = self._column([s.repetition_penalty for s in samplings])
            values = logits[at]
            repeated = torch.where(values > 0, values / repetition, values * repetition)
            values = torch.where(seen, repeated, values)
            values -= counts * self._column([s.frequency_penalty for s in samplings])
            values -= (counts > 0) * self._column([s.presence_penalty for s in samplings])
            logits[at] = values

    def _column(self, values: list[float]) -> Tensor:
        column = np.array(values, dtype=np.float32)[:, None]
        return torch.from_numpy(column).to(self._device, non_blocking=True)


def _prompt_part(chunk: Chunk) -> tuple[int, ...]:
    return chunk.token_ids[: max(chunk.num_prompt_tokens - chunk.start, 0)]


def _output_part(chunk: Chunk) -> tuple[int, ...]:
    return chunk.token_ids[max(chunk.num_prompt_tokens - chunk.start, 0) :]


def _blocks(rows: list[int], vocab_size: int) -> Iterator[list[int]]:
    """Parts of `rows` small enough that the temporaries of one part stay small."""
    step = max(1, _BLOCK_ELEMENTS // vocab_size)
    return (rows[first : first + step] for first in range(0, len(rows), step))
