"""One request's progress. Mutable, and never leaves engine/: the runner sees chunks of it only."""

from __future__ import annotations

from enum import Enum, auto

from kttrio.plan import Chunk, ChunkResult
from kttrio.request import FinishReason, GenerateRequest, TokenEvent, TokenLogprob


class Stage(Enum):
    """Where a sequence stands. It never goes back."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """A request with what it holds (slot, pages) and how far it has come.

    All its pages are reserved at admission. A chunk carries only those that it reaches; that
    tuple is kept until a chunk crosses into a new page, because one is needed at every step.
    """

    __slots__ = (
        "_last_token",
        "_page_size",
        "_prompt_logprobs",
        "_reached_pages",
        "_reached_tokens",
        "abandoned",
        "in_flight",
        "max_outputs",
        "num_computed",
        "num_outputs",
        "num_prompt",
        "pages",
        "request",
        "slot",
        "stage",
    )

    def __init__(self, request: GenerateRequest, *, page_size: int, max_outputs: int) -> None:
        self.request = request
        self.num_prompt = len(request.prompt_ids)
        self.max_outputs = max_outputs
        self.num_computed = 0  # tokens whose KV and state the runner has
        self.num_outputs = 0
        self.stage = Stage.WAITING
        self.in_flight = False  # part of the step that runs now
        self.abandoned = False  # nobody wants it any more; leaves at commit
        self.slot = -1
        self.pages: tuple[int, ...] = ()
        self._page_size = page_size
        self._reached_pages: tuple[int, ...] = ()
        self._reached_tokens = 0
        self._last_token = -1
        self._prompt_logprobs: list[TokenLogprob | None] | None = (
            None if request.sampling.prompt_logprobs is None else [None]
        )

    @property
    def num_cached(self) -> int:
        """Tokens that it will have computed at its end: the last output is never fed back."""
        return self.num_prompt + max(self.max_outputs - 1, 0)

    @property
    def num_pages(self) -> int:
        return -(-self.num_cached // self._page_size)

    def prompt_chunk(self, budget: int) -> Chunk:
        """The next at most `budget` tokens of the prompt."""
        end = min(self.num_computed + budget, self.num_prompt)
        token_ids = self.request.prompt_ids[self.num_computed : end]
        return self._chunk(token_ids, end == self.num_prompt and self.max_outputs > 0)

    def decode_chunk(self) -> Chunk:
        """The token drawn last."""
        return self._chunk((self._last_token,), True)

    def _chunk(self, token_ids: tuple[int, ...], sample: bool) -> Chunk:
        end = self.num_computed + len(token_ids)
        if end > self._reached_tokens:
            count = -(-end // self._page_size)
            self._reached_pages = self.pages[:count]
            self._reached_tokens = count * self._page_size
        return Chunk(
            self.slot,
            self.num_computed,
            token_ids,
            self._reached_pages,
            self.request.sampling,
            sample,
            self.num_prompt,
        )

    def advance(self, chunk: Chunk, result: ChunkResult) -> TokenEvent | None:
        """Take in what a step found; None while the prompt is not through."""
        self.num_computed += len(chunk.token_ids)
        if self._prompt_logprobs is not None and result.prompt_logprobs:
            self._prompt_logprobs.extend(result.prompt_logprobs)
        if self.num_computed < self.num_prompt:
            return None
        prompt_logprobs = self._take_prompt_logprobs()
        if not chunk.sample:
            return TokenEvent(None, FinishReason.LENGTH, None, prompt_logprobs)
        if result.token is None:
            error = "the runner drew no token where one was asked for"
            return TokenEvent(None, FinishReason.ERROR, error=error)
        self._last_token = result.token
        self.num_outputs += 1
        return TokenEvent(result.token, self._reason_to_end(), result.logprob, prompt_logprobs)

    def _reason_to_end(self) -> FinishReason | None:
        sampling = self.request.sampling
        if self._last_token in sampling.stop_token_ids and self.num_outputs >= sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_outputs >= self.max_outputs else None

    def _take_prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        if self._prompt_logprobs is None:
            return None
        scores, self._prompt_logprobs = tuple(self._prompt_logprobs), None
        return scores
