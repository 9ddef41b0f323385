"""The next token of every sequence that asks for one, over the whole batch at once, on the device.

Order of what changes the logits: stop ids banned below min_tokens, logit_bias, penalties, masks,
then the draw (`draw.py`). So masks have the last word, and where they leave nothing but banned
tokens, one of these is drawn. Nothing here leaves the device: `Sampled` is read after the step's
one copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kttrio.layers.batch import sent
from kttrio.plan import Chunk
from kttrio.request import SamplingParams
from kttrio.runner.draw import (
    MIN_TEMPERATURE,
    DrawParams,
    draw_filtered,
    draw_unfiltered,
    index_of,
    uniforms,
)
from kttrio.runner.logprobs import score
from kttrio.runner.masks import Bits, forbid
from kttrio.runner.penalties import TokenCounts, uses_penalties

_BANNED = -1e30  # finite: where every token is banned, one of them is still drawn


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the sampler found, on the device."""

    tokens: Tensor  # [rows] int64
    best: Tensor  # [rows] float32: the largest logit; not finite where the model failed
    scored: tuple[int, ...]
    """Rows that asked for log-probabilities."""
    scores: Tensor | None  # [scored, ...] as `logprobs.score`


@dataclass(frozen=True, slots=True)
class _Bias:
    """A request's logit_bias as arrays; `sampling` is what they were made of."""

    sampling: SamplingParams
    ids: NDArray[np.int64]
    values: NDArray[np.float32]


def output_position(chunk: Chunk) -> int:
    """Which output token comes after this chunk: 0 for the first."""
    return max(chunk.start + len(chunk.token_ids) - chunk.num_prompt_tokens, 0)


class Sampler:
    """Holds the token counts of sequences with penalties; otherwise each call stands alone."""

    def __init__(self, *, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._counts = TokenCounts(num_slots=num_slots, vocab_size=vocab_size, device=device)
        self._biases: dict[int, _Bias] = {}

    def observe(self, chunks: Sequence[Chunk]) -> None:
        """Take note of a step's tokens: once per step, all its chunks, before `sample`."""
        self._counts.observe(chunks)

    def sample(
        self, logits: Tensor, chunks: Sequence[Chunk], masks: Mapping[int, Bits] | None = None
    ) -> Sampled:
        """Draw one token per row; row i of logits [rows, vocab] float32 follows `chunks[i]`.

        `masks`, by row, say what may be drawn there, one token at least. The logits are
        overwritten.
        """
        scored = tuple(row for row, c in enumerate(chunks) if c.sampling.logprobs is not None)
        plain = not any(_changes_logits(chunk) for chunk in chunks)
        at = index_of(scored, logits)
        raw = logits[at] if not scored or (plain and not masks) else logits[at].clone()
        if not plain:
            self._ban_stops(logits, chunks)
            self._add_biases(logits, chunks)
            self._counts.penalise(logits, chunks)
        if masks:
            forbid(logits, masks)
        tokens = logits.argmax(-1)  # the first of equal ones
        best = logits.gather(-1, tokens[:, None]).squeeze(-1)
        self._draw(logits, chunks, tokens)
        scores = None
        if scored:
            num_top = max(chunks[row].sampling.logprobs or 0 for row in scored)
            scores = score(raw, tokens[at], num_top)
        return Sampled(tokens, best, scored, scores)

    def _draw(self, logits: Tensor, chunks: Sequence[Chunk], tokens: Tensor) -> None:
        """Replace the best token by a drawn one in the rows that are not greedy."""
        drawn = [row for row, chunk in enumerate(chunks) if not _is_greedy(chunk.sampling)]
        filtered = [row for row in drawn if self._is_filtered(chunks[row].sampling)]
        unfiltered = [row for row in drawn if not self._is_filtered(chunks[row].sampling)]
        for rows, draw in ((filtered, draw_filtered), (unfiltered, draw_unfiltered)):
            if rows:
                params = self._draw_params([chunks[row] for row in rows])
                at = index_of(rows, logits)
                tokens[at] = draw(logits[at], params)

    def _is_filtered(self, sampling: SamplingParams) -> bool:
        cut = 0 < sampling.top_k < self._vocab_size
        return cut or sampling.top_p < 1.0 or sampling.min_p > 0.0

    def _draw_params(self, chunks: Sequence[Chunk]) -> DrawParams:
        samplings = [chunk.sampling for chunk in chunks]
        top_k = np.array([s.top_k for s in samplings], dtype=np.int64)
        return DrawParams(
            temperature=np.array([s.temperature for s in samplings], dtype=np.float64),
            top_p=np.array([s.top_p for s in samplings], dtype=np.float64),
            top_k=np.where(top_k < self._vocab_size, top_k, 0),
            min_p=np.array([s.min_p for s in samplings], dtype=np.float64),
            uniform=uniforms(
                [s.seed for s in samplings], [output_position(chunk) for chunk in chunks]
            ),
        )

    def _ban_stops(self, logits: Tensor, chunks: Sequence[Chunk]) -> None:
        places = [
            (row, token)
            for row, chunk in enumerate(chunks)
            if output_position(chunk) < chunk.sampling.min_tokens
            for token in chunk.sampling.stop_token_ids
            if 0 <= token < self._vocab_size
        ]
        if places:
            rows, tokens = sent(places, self._device).unbind(-1)
            logits[rows, tokens] = _BANNED

    def _add_biases(self, logits: Tensor, chunks: Sequence[Chunk]) -> None:
        rows = [row for row, chunk in enumerate(chunks) if chunk.sampling.logit_bias]
        if not rows:
            return
        biases = [self._bias(chunks[row]) for row in rows]
        at_rows = np.repeat(np.array(rows, dtype=np.int64), [len(bias.ids) for bias in biases])
        at_ids = np.concatenate([bias.ids for bias in biases])
        values = np.concatenate([bias.values for bias in biases])
        places = (self._tensor(at_rows), self._tensor(at_ids))
        logits.index_put_(places, self._tensor(values), accumulate=True)

    def _bias(self, chunk: Chunk) -> _Bias:
        """The request's biases; ids beyond the vocabulary name no token and are left out."""
        known = self._biases.get(chunk.slot)
        if known is not None and known.sampling is chunk.sampling:
            return known
        pairs = [pair for pair in chunk.sampling.logit_bias if 0 <= pair[0] < self._vocab_size]
        bias = _Bias(
            chunk.sampling,
            np.array([token for token, _ in pairs], dtype=np.int64),
            np.array([value for _, value in pairs], dtype=np.float32),
        )
        self._biases[chunk.slot] = bias
        return bias

    def _tensor(self, array: NDArray[np.int64] | NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _is_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature <= MIN_TEMPERATURE or sampling.top_k == 1


def _changes_logits(chunk: Chunk) -> bool:
    sampling = chunk.sampling
    return (
        bool(sampling.logit_bias)
        or uses_penalties(sampling)
        or output_position(chunk) < sampling.min_tokens
    )
