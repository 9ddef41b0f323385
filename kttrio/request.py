"""What the server asks of the engine and what comes back, in token ids only.

Plain records: no text, no torch, no trio. Strings (stop strings, templates, tool calls) never
pass this wall; the front of the house keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol


class FinishReason(StrEnum):
    """Why a sequence produced its last event; the values are what OpenAI clients know."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. The server validates the ranges; the engine trusts them.

    `temperature` 0 means greedy. `top_k` 0 and `top_p` 1.0 mean off. `seed` is always set: the
    draw at output position i depends on (seed, i) alone, never on the rest of the batch.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    """Ids that end the sequence: the model's own end tokens (absent with `ignore_eos`) and the
    request's."""
    logprobs: int | None = None
    """None: no log-probabilities. n >= 0: that of the sampled token and the n best beside it."""
    prompt_logprobs: int | None = None
    """The same for every prompt token after the first."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageInput:
    """An image in a prompt, made to the model's measure; each is equal only to itself."""

    start: int
    """Position of its first token; `rows` x `columns` follow each other, row by row."""
    rows: int
    columns: int
    pixels: bytes = field(repr=False)
    """Red, green and blue of each pixel, row by row from the top."""
    token_side: int
    """Pixels along a side of the square that a token shows."""
    mean: tuple[float, float, float]
    """By colour, from 0 to 1: the model sees (value - mean) / deviation."""
    deviation: tuple[float, float, float]

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + self.rows * self.columns


class Masks(Protocol):
    """Which tokens may come next, on their way: they are made while the step is computed."""

    def wait(self) -> Sequence[bytes | None]:
        """One mask for each position that was asked for: token i may come where bit i % 8 of byte
        i // 8 is 1, and not where the mask has no such bit; None: all may. Blocks; from any thread.
        Raises RuntimeError where there is none."""
        ...


class Constraint(Protocol):
    """What one sequence may say. Knows its output so far; the engine asks, one call at a time, in
    the event loop: nothing here takes long."""

    def masks(self, drafts: tuple[int, ...]) -> Masks:
        """Begin to make the masks of the next position and of those behind each of `drafts`. What
        stands behind a draft that may not come is never looked at."""
        ...

    def advance(self, token: int) -> None:
        """This token has been drawn."""
        ...


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate. `max_tokens` 0 only scores the prompt."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    images: tuple[ImageInput, ...] = ()
    """In the order of their places, where `prompt_ids` has the model's token for images."""
    constraint: Constraint | None = None
    """Of this sequence alone. None: it may say anything."""


class TokenLogprob(NamedTuple):
    """Natural-log probability of one token under the model, before temperature and penalties."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable (token, logprob) pairs, best first."""


class TokenEvent(NamedTuple):
    """One token of one sequence, or its end; a step brings several where drafts are accepted.

    The last event has `finish` set. It carries the final token (`token` None when there is none:
    scoring only, abort, error). A stop token is reported: the text side leaves it out.
    """

    token: int | None
    finish: FinishReason | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """Sent once, with the first event, when asked for; entry 0 is None."""
    error: str | None = None
    accepted: bool = False
    """The token had been drafted before it was drawn."""
    rejected: int = 0
    """Drafts that turn out useless by this token or the end."""
