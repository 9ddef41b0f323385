"""Log-probabilities under the model itself: before temperature, penalties and biases.

`Scored` lies on the device until the step's one copy to the host; `PromptScorer` keeps the one
hidden row per slot that scores the first token of a prompt's next chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kttrio.plan import Chunk
from kttrio.request import TokenLogprob
from kttrio.runner.draw import ordered_topk

BLOCK_ROWS = 256  # rows of logits that exist at the same time while a prompt is scored


def score(logits: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """[rows, 1 + 2 * num_top] float64: the token's log-probability, the best ones', their ids."""
    norm = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(-1, tokens[:, None]) - norm
    if num_top == 0:
        return own.double()
    values, ids = ordered_topk(logits, min(num_top, logits.shape[-1]))
    return torch.cat([own.double(), (values - norm).double(), ids.double()], dim=-1)


def read_scores(
    tokens: Sequence[int], scores: NDArray[np.float64], num_top: Sequence[int]
) -> list[TokenLogprob]:
    """Rows of `score`, on the host, as records; row i keeps its `num_top[i]` best."""
    width = scores.shape[-1] // 2
    return [
        TokenLogprob(
            token,
            row[0],
            tuple((int(row[1 + width + j]), row[1 + j]) for j in range(min(count, width))),
        )
        for token, row, count in zip(tokens, scores.tolist(), num_top, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The scores of one chunk's own prompt tokens, still on the device."""

    tokens: tuple[int, ...]
    scores: Tensor  # as `score`
    num_top: int

    def read(self, scores: NDArray[np.float64]) -> tuple[TokenLogprob, ...]:
        return tuple(read_scores(self.tokens, scores, [self.num_top] * len(self.tokens)))


class PromptScorer:
    """Scores prompt tokens across chunk borders.

    The token at position p is scored by the hidden row of p - 1. For a chunk's first token that row
    belongs to the chunk before: it is kept for the slot from step to step, only where asked for.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        self._logits = logits
        self._last_row: dict[int, tuple[int, Tensor]] = {}  # slot -> position, hidden [1, hidden]

    def score(self, chunk: Chunk, hidden: Tensor) -> PromptScores | None:
        """Score the chunk's prompt tokens from its hidden rows; None where none are asked for.

        Raises ValueError where the chunk does not continue what the slot held.
        """
        before = self._last_row.pop(chunk.slot, None)
        num_top = chunk.sampling.prompt_logprobs
        num_prompt = min(chunk.num_prompt_tokens - chunk.start, len(chunk.token_ids))
        if num_top is None or num_prompt <= 0:
            return None
        end = chunk.start + len(chunk.token_ids)
        if end < chunk.num_prompt_tokens:
            self._last_row[chunk.slot] = (end - 1, hidden[-1:].clone())
        tokens = chunk.token_ids[:num_prompt]
        rows = hidden[: num_prompt - 1]
        if chunk.start == 0:
            tokens = tokens[1:]
        elif before is not None and before[0] == chunk.start - 1:
            rows = torch.cat([before[1], rows])
        else:
            raise ValueError(
                f"slot {chunk.slot}: the row before position {chunk.start} is gone, so the prompt "
                "token there cannot be scored; a scored prompt must be computed from its start"
            )
        return PromptScores(tokens, self._score_rows(rows, tokens, num_top), num_top)

    def _score_rows(self, rows: Tensor, tokens: tuple[int, ...], num_top: int) -> Tensor:
        targets = torch.tensor(tokens, dtype=torch.int64).to(rows.device, non_blocking=True)
        blocks = [
            score(self._logits(rows[first : first + BLOCK_ROWS]), target, num_top)
            for first, target in _in_blocks(targets)
        ]
        return torch.cat(blocks)


def _in_blocks(targets: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, targets) of each block; one empty block where there is no target."""
    for first in range(0, max(len(targets), 1), BLOCK_ROWS):
        yield first, targets[first : first + BLOCK_ROWS]
