"""Who runs in the next step. Plain synchronous Python: no trio, no threads, no tensors.

First come, first served: a request that does not fit yet holds back those behind it. Admission
takes a slot and the pages of the prompt; after that a sequence takes a page whenever it enters a
new one, and those for drafts as long as nobody needs them more. Where none is free, the youngest
running sequence is preempted: it loses slot and pages, goes back to the head of the queue, and is
computed again later, prompt and outputs so far as one sequence from position 0. What was drawn
stays drawn and is not delivered again.

Those that run, then the preempted, then those that wait are always in order of arrival. So the
oldest is never preempted by a younger one, and as `submit` takes nothing that could not fit alone,
it always ends. A preempted sequence cannot be admitted again before another one has ended: what it
gave up went, at least in part, to an older one.

A long prompt may pass through the model layer by layer, beside the steps and outside their budget
(`passage.py`). Younger ones that are short do not wait for it: they get their first tokens earlier.

At most one step is in flight. What a sequence holds is given back at the commit of the step that
may still write to it, never before; preemption belongs to `plan`, when no step writes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from kttrio.config import ConfigError, EngineConfig
from kttrio.engine.errors import QueueFull, RequestTooLarge
from kttrio.engine.pages import PagePool
from kttrio.engine.passage import Passage
from kttrio.engine.sequence import Sequence, Stage
from kttrio.plan import Capacity, Chunk, ChunkResult, StepPlan, StepResult
from kttrio.request import FinishReason, GenerateRequest, TokenEvent

Events = list[tuple[Sequence, TokenEvent]]

_RETRY_SECONDS = (1.0, 30.0)
_RECOMPUTE_SHARE = 32
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
        self._running: dict[Sequence, None] = {}  # in order of arrival, as the two queues
        self._preempted: deque[Sequence] = deque()
        self._waiting: deque[Sequence] = deque()
        self.num_preemptions = 0
        self.num_drafted = 0  # drafts that were verified, and those of them that became outputs
        self.num_accepted = 0
        self._plan: StepPlan | None = None
        self._planned: list[Sequence] = []  # beside the plan's chunks; last who is on the passage
        self._passage = Passage(capacity)
        self.admitted: list[Sequence] = []
        """Who got a slot with the last plan, the preempted included."""
        self._step_seconds = 0.0

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run: never begun, or preempted."""
        return len(self._waiting) + len(self._preempted)

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
        return not (self._running or self._preempted or self._waiting)

    @property
    def longest_sequence(self) -> int:
        """Prompt and output of the longest request that `submit` accepts, in tokens."""
        return min(self._capacity.context_length, self._pool.num_pages * self._capacity.page_size)

    @property
    def most_sequences(self) -> int:
        """Sequences that may run and wait together, if each finds room."""
        return self.num_slots + self._max_queued

    def submit(self, request: GenerateRequest) -> Sequence:
        """Queue a request. `max_tokens` beyond the longest sequence that could run is cut there.

        Raises RequestTooLarge for what could never run, QueueFull when too many wait; the
        preempted are not counted, they have been taken already.
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
        """The next step: one token of every sequence that decodes, then prompts up to the budget,
        and one of those that are too long for it.

        Drafts come along where nobody has to give up anything for them. A preempted sequence's
        tokens count as its prompt. None when there is nothing to do.
        """
        if self._plan is not None:
            raise RuntimeError("a step is in flight: commit it before the next plan")
        self.admitted.clear()
        prompts: list[Sequence] = []
        planned: list[Sequence] = []
        for sequence in list(self._running):
            if sequence.stage is not Stage.RUNNING:
                break  # preempted for an older one, and with it all that come after
            if not sequence.is_decoding:
                prompts.append(sequence)
            elif not sequence.needs_page or self._grow(sequence):
                planned.append(sequence)
        chunks = self._plan_decodes(planned)
        self._plan_prompts(prompts, chunks, planned)
        long = self._plan_long(prompts, planned)
        if not planned:
            return None
        for sequence in planned:
            sequence.in_flight = True
        self._plan, self._planned = StepPlan(tuple(chunks), long), planned
        return self._plan

    def commit(self, plan: StepPlan, result: StepResult) -> Events:
        """Take in a finished step; what ended or was abandoned gives back its slot and pages.

        `result` answers `plan` chunk by chunk.
        """
        events: Events = []
        for sequence, chunk, found in self._answered(plan, result):
            if sequence.abandoned:
                self._release(sequence)
                continue
            news = sequence.advance(chunk, found)
            if not news:
                continue
            if news[-1].finish is not None:
                self._release(sequence)
            for event in news:
                events.append((sequence, event))
            if chunk.num_drafts:
                self.num_drafted += chunk.num_drafts
                self.num_accepted += sum(event.accepted for event in news)
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
        elif sequence.stage is Stage.PREEMPTED:
            self._preempted.remove(sequence)
            sequence.stage = Stage.FINISHED
        elif sequence.in_flight:
            sequence.abandoned = True
        elif sequence.stage is Stage.RUNNING:
            self._release(sequence)

    def clear(self) -> None:
        """Drop every sequence without events. Only once no step writes to their pages any more."""
        self._plan, self._planned = None, []
        for queue in (self._preempted, self._waiting):
            for sequence in queue:
                sequence.stage = Stage.FINISHED
            queue.clear()
        for sequence in list(self._running):
            self._release(sequence)

    def _admissible(self, request: GenerateRequest) -> Sequence:
        num_prompt, wanted = len(request.prompt_ids), request.sampling.max_tokens
        if num_prompt == 0:
            raise ValueError("the prompt has no tokens; it needs one at least")
        room = self.longest_sequence - num_prompt
        if room < min(wanted, 1):
            raise RequestTooLarge(f"the prompt has {num_prompt} tokens and {self._limit()}")
        return Sequence(
            request,
            page_size=self._capacity.page_size,
            max_outputs=min(wanted, room),
            max_drafts=self._capacity.num_drafts,
        )

    def _limit(self) -> str:
        """What bounds the longest sequence, and the mend."""
        context, longest = self._capacity.context_length, self.longest_sequence
        if longest == context:
            limit, flag = f"the context length is {context}", "--context-length"
        else:
            limit, flag = f"the KV cache holds {longest}", "--max-total-tokens"
        return f"{limit}, prompt and output together; shorten the prompt or raise {flag}"

    def _places(self, newcomer: Sequence) -> int:
        """How many of those never begun only wait for the step in flight to end, not for room."""
        if not self._has_room(self._next_in_line() or newcomer):
            return 0
        return max(len(self._free_slots) - len(self._preempted), 0)

    def _next_in_line(self) -> Sequence | None:
        queue = self._preempted or self._waiting
        return queue[0] if queue else None

    def _has_room(self, newcomer: Sequence) -> bool:
        """A slot and the pages to compute it, and for all that then run some to grow into.

        Admitted into the last pages it would be preempted as soon as an older one needs them, and
        its prompt computed for nothing. So there must be pages for each to decode for a while: at
        least a page's tokens, more for a long prompt, which is dear to compute again.
        """
        growth = max(
            self._capacity.page_size,
            2 * self._capacity.num_drafts,
            newcomer.num_known // _RECOMPUTE_SHARE,
        )
        needed = newcomer.num_pages(growth)
        if not self._free_slots or needed > self._pool.num_free:
            return False
        for sequence in self._running:
            needed += sequence.num_pages(growth) - len(sequence.pages)
        return needed <= self._pool.num_free

    def _grow(self, sequence: Sequence) -> bool:
        """Take one more page, the youngest's if none is free; False if that is itself."""
        if self._pool.num_free == 0 and self._capacity.num_drafts:
            for other in self._running:
                if other is not self._passage.sequence:  # its chunk, handed out, names them all
                    self._pool.give_back(other.give_up_ahead())
        if self._pool.num_free == 0:
            youngest = next(reversed(self._running))
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages += self._pool.take(1)
        return True

    def _plan_decodes(self, decoding: list[Sequence]) -> list[Chunk]:
        if not self._capacity.num_drafts:
            return [sequence.next_chunk(1) for sequence in decoding]
        spare = self._budget - len(self._running)  # a token for each, the prompts included
        chunks = []
        for sequence in decoding:
            self._reserve(sequence)
            chunks.append(sequence.next_chunk(1 + spare))
            spare -= chunks[-1].num_drafts
        return chunks

    def _reserve(self, sequence: Sequence) -> None:
        """Take pages for drafts, its own and those it is to make, as far as any are free."""
        lacking = sequence.num_pages(sequence.num_ahead) - len(sequence.pages)
        if lacking > 0:
            sequence.pages += self._pool.take(min(lacking, self._pool.num_free))

    def _plan_prompts(
        self, prompts: list[Sequence], chunks: list[Chunk], planned: list[Sequence]
    ) -> None:
        budget = self._budget - len(chunks) - sum(chunk.num_drafts for chunk in chunks)
        for sequence in prompts:
            if budget == 0:
                return
            if not self._passage.takes(sequence):
                budget -= self._plan_prompt(sequence, budget, chunks, planned)
        while budget > 0 and (head := self._next_in_line()) and self._has_room(head):
            self._admit(head)
            prompts.append(head)
            if not self._passage.takes(head):
                budget -= self._plan_prompt(head, budget, chunks, planned)

    def _plan_prompt(
        self, sequence: Sequence, budget: int, chunks: list[Chunk], planned: list[Sequence]
    ) -> int:
        self._reserve(sequence)
        chunk = sequence.next_chunk(budget)
        chunks.append(chunk)
        planned.append(sequence)
        return len(chunk.token_ids)

    def _plan_long(self, prompts: list[Sequence], planned: list[Sequence]) -> Chunk | None:
        passage = self._passage
        if passage.sequence is None and (first := next(filter(passage.takes, prompts), None)):
            self._reserve(first)
            passage.begin(first)
        if passage.sequence is not None:
            planned.append(passage.sequence)
        return passage.chunk

    def _admit(self, head: Sequence) -> None:
        (self._preempted or self._waiting).popleft()
        head.pages = self._pool.take(head.num_pages(0))
        head.slot = self._free_slots.pop()
        head.stage = Stage.RUNNING
        self._running[head] = None
        self.admitted.append(head)

    def _preempt(self, youngest: Sequence) -> None:
        self._vacate(youngest)
        youngest.restart()
        youngest.stage = Stage.PREEMPTED
        self._preempted.appendleft(youngest)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._vacate(sequence)
        sequence.stage = Stage.FINISHED

    def _vacate(self, sequence: Sequence) -> None:
        if sequence is self._passage.sequence:
            self._passage.end()
        del self._running[sequence]
        self._free_slots.append(sequence.slot)
        self._pool.give_back(sequence.pages)

    def _answered(
        self, plan: StepPlan, result: StepResult
    ) -> Iterable[tuple[Sequence, Chunk, ChunkResult]]:
        """Close the step; whose chunks are through, and what was found of each. The long one may
        still be on its way."""
        planned, chunks, found = self._close_step(plan), plan.chunks, result.chunks
        if plan.long is not None and result.long is not None:
            self._passage.end()
            chunks, found = (*chunks, plan.long), (*found, result.long)
        elif plan.long is not None:
            on_its_way = planned.pop()
            if on_its_way.abandoned:
                self._release(on_its_way)
        return zip(planned, chunks, found, strict=True)

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
        """When the first running sequence ends at the latest, if steps stay as long as they are.

        A guess: the preempted go before the newcomer, and a sequence may be preempted itself.
        """
        steps = min((s.max_outputs - s.num_outputs for s in self._running), default=0)
        low, high = _RETRY_SECONDS
        return float(min(max(math.ceil(steps * self._step_seconds), low), high))
