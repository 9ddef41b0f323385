"""Who runs in the next step. Plain synchronous Python: no trio, no threads, no tensors.

First come, first served: a request that does not fit yet holds back those behind it. Admission
takes a slot and every page that the request can ever need (prompt and `max_tokens`, at most the
context length), so that whoever runs can finish: nothing is ever evicted and nothing recomputed.
The price is that a generous `max_tokens` occupies pages it may never use.

At most one step is in flight. What a sequence holds is given back at the commit of the step that
may still write to it, never before.
"""

from __future__ import annotations

import math
from collections import deque

from kttrio.config import ConfigError, EngineConfig
from kttrio.engine.errors import QueueFull, RequestTooLarge
from kttrio.engine.pages import PagePool
from kttrio.engine.sequence import Sequence, Stage
from kttrio.plan import Capacity, Chunk, StepPlan, StepResult
from kttrio.request import FinishReason, GenerateRequest, TokenEvent

Events = list[tuple[Sequence, TokenEvent]]

_RETRY_SECONDS = (1.0, 30.0)
_STEP_SMOOTHING = 0.9


class Scheduler:
    """Requests in, step plans out; step results in, events out.

    The caller alternates `plan` and `commit` (or `fail`); `submit` and `abort` may come at any
    time between them.
    """

    def __init__(self, capacity: Capacity, config: EngineConfig) -> None:
        self._capacity = capacity
        self._max_queued = config.max_queued_requests
        self._budget = min(config.chunked_prefill_size, capacity.max_step_tokens)
        # No more sequences than tokens in a step: every running one gets on in every step, and
        # while one is still in its prompt the others cannot use up the whole budget.
        self.num_slots = min(config.max_running_requests, capacity.num_slots, self._budget)
        if self.num_slots < 1:
            raise ConfigError(
                f"nothing could ever run with --max-running-requests {config.max_running_requests}"
                f" and --chunked-prefill-size {config.chunked_prefill_size} on {capacity}; "
                "each must be at least 1"
            )
        self._pool = PagePool(capacity.num_pages)
        self._free_slots = list(range(self.num_slots - 1, -1, -1))
        self._waiting: deque[Sequence] = deque()
        self._running: dict[Sequence, None] = {}  # in order of admission
        self._plan: StepPlan | None = None
        self._planned: list[Sequence] = []  # beside the plan's chunks
        self._step_seconds = 0.0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def num_free_pages(self) -> int:
        return self._pool.num_free

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def is_empty(self) -> bool:
        return not self._running and not self._waiting

    @property
    def longest_sequence(self) -> int:
        """Prompt and output of the longest request that `submit` accepts, in tokens."""
        return min(self._capacity.context_length, self._pool.num_pages * self._capacity.page_size)

    def submit(self, request: GenerateRequest) -> Sequence:
        """Queue a request. `max_tokens` beyond the context length is cut there.

        Raises RequestTooLarge for what could never run, QueueFull when too many wait.
        """
        sequence = self._admissible(request)
        if len(self._waiting) >= self._max_queued + self._places(sequence):
            raise QueueFull(
                f"{len(self._waiting)} requests wait already and --max-queued-requests is "
                f"{self._max_queued}; try again later",
                retry_after=self._retry_after(),
            )
        self._waiting.append(sequence)
        return sequence

    def plan(self) -> StepPlan | None:
        """The next step: one token of every sequence that decodes, then prompts up to the budget.

        None when there is nothing to do.
        """
        if self._plan is not None:
            raise RuntimeError("a step is in flight: commit it before the next plan")
        chunks: list[Chunk] = []
        prompts: list[Sequence] = []
        planned: list[Sequence] = []
        for sequence in self._running:
            if sequence.num_computed < sequence.num_prompt:
                prompts.append(sequence)
            else:
                chunks.append(sequence.decode_chunk())
                planned.append(sequence)
        self._plan_prompts(prompts, chunks, planned)
        if not chunks:
            return None
        for sequence in planned:
            sequence.in_flight = True
        self._plan, self._planned = StepPlan(tuple(chunks)), planned
        return self._plan

    def commit(self, plan: StepPlan, result: StepResult) -> Events:
        """Take in a finished step; what ended or was abandoned gives back its slot and pages.

        `result` answers `plan` chunk by chunk.
        """
        events: Events = []
        planned = self._close_step(plan)
        for sequence, chunk, found in zip(planned, plan.chunks, result.chunks, strict=True):
            if sequence.abandoned:
                self._release(sequence)
                continue
            event = sequence.advance(chunk, found)
            if event is None:
                continue
            if event.finish is not None:
                self._release(sequence)
            events.append((sequence, event))
        self._smooth(result.seconds)
        return events

    def fail(self, plan: StepPlan, error: str) -> Events:
        """End the sequences of a step that failed, and only those, with an error event."""
        planned = self._close_step(plan)
        for sequence in planned:
            self._release(sequence)
        event = TokenEvent(None, FinishReason.ERROR, error=error)
        return [(sequence, event) for sequence in planned if not sequence.abandoned]

    def abort(self, sequence: Sequence) -> None:
        """Nobody wants this sequence any more; it makes no further event.

        Inside the running step it is only marked, because that step still writes to its pages.
        """
        if sequence.stage is Stage.WAITING:
            self._waiting.remove(sequence)
            sequence.stage = Stage.FINISHED
        elif sequence.in_flight:
            sequence.abandoned = True
        elif sequence.stage is Stage.RUNNING:
            self._release(sequence)

    def clear(self) -> None:
        """Drop every sequence without events. Only once no step writes to their pages any more."""
        self._plan, self._planned = None, []
        for sequence in self._waiting:
            sequence.stage = Stage.FINISHED
        self._waiting.clear()
        for sequence in list(self._running):
            self._release(sequence)

    def _admissible(self, request: GenerateRequest) -> Sequence:
        context = self._capacity.context_length
        num_prompt, wanted = len(request.prompt_ids), request.sampling.max_tokens
        if num_prompt == 0:
            raise ValueError("the prompt has no tokens; it needs one at least")
        room = context - num_prompt
        if room < min(wanted, 1):
            raise RequestTooLarge(
                f"the prompt has {num_prompt} tokens and the context length is {context}, prompt "
                "and output together; shorten the prompt or raise --context-length"
            )
        page_size = self._capacity.page_size
        sequence = Sequence(request, page_size=page_size, max_outputs=min(wanted, room))
        if sequence.num_pages > self._pool.num_pages:
            raise RequestTooLarge(
                f"{num_prompt} prompt tokens and max_tokens {wanted} need {sequence.num_pages} "
                f"pages of {page_size} tokens, and there are {self._pool.num_pages} "
                f"({self._pool.num_pages * page_size} tokens); lower max_tokens, shorten the "
                "prompt or raise --max-total-tokens"
            )
        return sequence

    def _places(self, newcomer: Sequence) -> int:
        """How many of the queue only wait for the step in flight to end, not for room."""
        head = self._waiting[0] if self._waiting else newcomer
        return len(self._free_slots) if self._has_room(head) else 0

    def _has_room(self, sequence: Sequence) -> bool:
        return bool(self._free_slots) and sequence.num_pages <= self._pool.num_free

    def _plan_prompts(
        self, prompts: list[Sequence], chunks: list[Chunk], planned: list[Sequence]
    ) -> None:
        budget = self._budget - len(chunks)
        for sequence in prompts:
            if budget == 0:
                return
            budget -= self._plan_prompt(sequence, budget, chunks, planned)
        while budget > 0 and self._waiting and self._has_room(self._waiting[0]):
            sequence = self._waiting.popleft()
            self._admit(sequence)
            budget -= self._plan_prompt(sequence, budget, chunks, planned)

    @staticmethod
    def _plan_prompt(
        sequence: Sequence, budget: int, chunks: list[Chunk], planned: list[Sequence]
    ) -> int:
        chunk = sequence.prompt_chunk(budget)
        chunks.append(chunk)
        planned.append(sequence)
        return len(chunk.token_ids)

    def _admit(self, sequence: Sequence) -> None:
        sequence.pages = self._pool.take(sequence.num_pages)
        sequence.slot = self._free_slots.pop()
        sequence.stage = Stage.RUNNING
        self._running[sequence] = None

    def _release(self, sequence: Sequence) -> None:
        del self._running[sequence]
        self._free_slots.append(sequence.slot)
        self._pool.give_back(sequence.pages)
        sequence.stage = Stage.FINISHED

    def _close_step(self, plan: StepPlan) -> list[Sequence]:
        if plan is not self._plan:
            raise RuntimeError("this plan is not the one in flight")
        planned, self._plan, self._planned = self._planned, None, []
        for sequence in planned:
            sequence.in_flight = False
        return planned

    def _smooth(self, seconds: float) -> None:
        keep = _STEP_SMOOTHING if self._step_seconds else 0.0
        self._step_seconds = keep * self._step_seconds + (1.0 - keep) * seconds

    def _retry_after(self) -> float:
        """When the first running sequence ends at the latest, if steps stay as long as they are."""
        steps = min((s.max_outputs - s.num_outputs for s in self._running), default=0)
        low, high = _RETRY_SECONDS
        return float(min(max(math.ceil(steps * self._step_seconds), low), high))
