"""The one record that the two wings share: what a step computes, and what it found.

The engine writes a `StepPlan` without knowing tensors; the runner turns it into tensors without
knowing requests. All of it is plain data, so that the runner may live in another process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kttrio.request import ImageInput, Masks, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the runner has allocated; the scheduler never plans beyond it."""

    num_slots: int
    """Sequences that may hold state at the same time (recurrent state and sampling rows)."""
    num_pages: int
    page_size: int
    """Tokens per page."""
    context_length: int
    """Longest sequence, prompt and output together, in tokens."""
    max_step_tokens: int
    """Most tokens of one step, over all chunks."""
    vocab_size: int
    num_drafts: int = 0
    """Most tokens of a sequence that a step drafts for the next one; 0: it drafts none."""
    long_tokens: int = 0
    """A prompt that lacks so many tokens passes through the model layer by layer, over several
    steps, instead of chunk by chunk; 0: none does."""
    max_long_tokens: int = 0
    """Most tokens of such a passage; what a prompt has beyond them comes after it."""


# A tuple: one is made per sequence and step, and a frozen dataclass takes longer to make.
class Chunk(NamedTuple):
    """Consecutive tokens of one sequence. Decode is a chunk of one token: there is no phase.

    `start` 0 begins a new sequence: whatever the slot held before must not matter.
    `pages` is the sequence's page table up to the last token of this chunk, or farther where
    drafts are to be made.
    """

    slot: int
    start: int
    token_ids: tuple[int, ...]
    pages: tuple[int, ...]
    sampling: SamplingParams
    sample: bool
    """Draw the token after the last one of this chunk; False in the middle of a prompt."""
    num_prompt_tokens: int
    """Tokens of the sequence below this position are prompt, the others output (penalties and
    the random draw count output tokens from here)."""
    num_drafts: int = 0
    """So many tokens at the end are drafts to verify, after a single known one. The first that is
    not the token drawn in its place, and what comes after it, is as if it had not been there."""
    draft_end: int = 0
    """Drafts for the next chunk are wanted at positions below this. Making the one at position p
    writes to position p - 2."""
    following: int | None = None
    """The known token after the chunk, where there is one and drafts will be made: the layer that
    makes them needs it at the chunk's last position."""
    images: tuple[ImageInput, ...] = ()
    """All of the sequence, whichever of their tokens the chunk has."""
    masks: Masks | None = None
    """What may be drawn at each position that is sampled: after the drafts before it."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. No two chunks share a slot or a page."""

    chunks: tuple[Chunk, ...]
    long: Chunk | None = None
    """A long piece of a prompt on its way through the layers, not one of `chunks`. The same one
    comes with every step until its result does; a plan without it ends it where it stands."""

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


class ChunkResult(NamedTuple):
    """What one chunk of the plan found, in the plan's order."""

    tokens: tuple[int, ...]
    """The sampled tokens: as many of the chunk's drafts as stand, and the one after them. Empty
    where the chunk did not ask."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token, when the request asks."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """The chunk's own prompt tokens in order, when the request asks. The sequence's first token has
    no entry; a later chunk's first token has one, so the prompt's chunks must follow each other
    in one slot. None where the chunk holds no prompt token."""
    error: str | None = None
    """Why this sequence cannot go on, while the others of its step can."""
    drafts: tuple[int, ...] = ()
    """What may come after `tokens`: at most `Capacity.num_drafts`, none from `draft_end` on."""


@dataclass(frozen=True, slots=True)
class StepResult:
    chunks: tuple[ChunkResult, ...]
    seconds: float
    """Wall time of the step in the runner."""
    long: ChunkResult | None = None
    """Of the plan's long piece, once it is through."""


class StepRunner(Protocol):
    """Computes steps, one at a time, in one thread of its own."""

    @property
    def capacity(self) -> Capacity: ...

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step. An exception fails the plan's sequences, and only those; what is wrong
        with some of them stands in their results."""
        ...

    def close(self) -> None: ...
