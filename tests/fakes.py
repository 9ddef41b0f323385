"""Stand-ins for the big parts, without torch: a runner that follows a script, and a constraint
that follows a rule."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from kttrio.plan import Capacity, Chunk, ChunkResult, StepPlan, StepResult
from kttrio.request import TokenLogprob

Script = Callable[[tuple[int, ...], int], int]
"""(prompt, i) -> the i-th output token, i from 0."""


def capacity(
    *,
    num_slots: int = 8,
    num_pages: int = 256,
    page_size: int = 16,
    context_length: int = 1024,
    max_step_tokens: int = 512,
    vocab_size: int = 1000,
    num_drafts: int = 0,
    long_tokens: int = 0,
    max_long_tokens: int = 0,
) -> Capacity:
    """A small runner's capacity; any number may be given."""
    sizes = (num_slots, num_pages, page_size, context_length, max_step_tokens, vocab_size)
    return Capacity(*sizes, num_drafts, long_tokens, max_long_tokens)


def scripted_token(prompt: tuple[int, ...], i: int, vocab_size: int = 1000) -> int:
    """The default script: any two prompts or positions almost surely differ."""
    return hash((prompt, i)) % vocab_size


def drafted_token(prompt: tuple[int, ...], i: int, token: int) -> int:
    """What a ScriptedRunner drafts where the script has `token`: the same, two times of three."""
    return token if hash((i, prompt)) % 3 else abs(token - 1)


Rule = Callable[[tuple[int, ...]], Collection[int] | None]
"""The outputs so far -> the tokens that may follow; None: all."""


def mask_of(allowed: Collection[int] | None) -> bytes | None:
    """The tokens' mask, no longer than it must be."""
    if allowed is None:
        return None
    bits = sum(1 << token for token in set(allowed))
    return bits.to_bytes(-(-bits.bit_length() // 8), "little")


def is_allowed(token: int, mask: bytes | None) -> bool:
    if mask is None:
        return True
    return token // 8 < len(mask) and bool(mask[token // 8] >> token % 8 & 1)


@dataclass(frozen=True)
class MadeMasks:
    """Masks that are there, or a reason why there are none."""

    masks: Sequence[bytes | None] | str

    def wait(self) -> Sequence[bytes | None]:
        if isinstance(self.masks, str):
            raise RuntimeError(self.masks)
        return self.masks


class RuledConstraint:
    """Allows what the rule allows, and keeps what it hears and is asked.

    Behind a draft that may not come stands an empty mask: nobody is to look at it.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.outputs: tuple[int, ...] = ()
        self.asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        """The outputs, and the drafts, of each time."""

    def masks(self, drafts: tuple[int, ...]) -> MadeMasks:
        self.asked.append((self.outputs, drafts))
        made = [mask_of(self._rule(self.outputs))]
        for place, draft in enumerate(drafts):
            stands = is_allowed(draft, made[-1])
            behind = (*self.outputs, *drafts[: place + 1])
            made.append(mask_of(self._rule(behind)) if stands else b"")
        return MadeMasks(made)

    def advance(self, token: int) -> None:
        self.outputs = (*self.outputs, token)

    def anew(self) -> RuledConstraint:
        """The same for another answer."""
        return RuledConstraint(self._rule)


class PlanError(AssertionError):
    """The engine broke the contract of `StepPlan`."""


@dataclass
class _Tenant:
    """What the fake knows of the sequence in a slot: all its tokens and its pages."""

    token_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    prompt: tuple[int, ...] | None = None
    masked: bool | None = None
    """Whether its chunks that draw have masks: all or none."""


class ScriptedRunner:
    """Answers every plan by the script, and checks each chunk against all that went before.

    Where the capacity has drafts it makes them, right ones and wrong ones, and accepts the right.

    Where the masks of a chunk do not allow the script's token it draws the lowest that they allow.

    A chunk at position 0 begins anew, in whatever slot: outputs that it brings along (a preempted
    sequence is computed again) must be the script's own, as those fed back one by one.
    Long ones are on their way for `long_steps` steps.
    `fail_steps`: numbers (from 0) of the steps that raise `failure`. `delay`: seconds that a
    step sleeps in its thread. `violations` lists every broken invariant, because the engine
    turns what `step` raises into error events. `history` keeps the last plans.
    """

    def __init__(
        self,
        capacity: Capacity | None = None,
        script: Script | None = None,
        *,
        fail_steps: Collection[int] = (),
        failure: BaseException | None = None,
        delay: float = 0.0,
        long_steps: int = 3,
    ) -> None:
        self._capacity = capacity if capacity is not None else _DEFAULT_CAPACITY
        vocab_size = self._capacity.vocab_size
        self._script = script or (lambda prompt, i: scripted_token(prompt, i, vocab_size))
        self._fail_steps = fail_steps
        self._failure = failure or RuntimeError("scripted failure")
        self._delay = delay
        self._long_steps = long_steps
        self._long: Chunk | None = None  # under way, for so many steps now
        self._num_passed = 0
        self._tenants: dict[int, _Tenant] = {}
        self._drafts: dict[int, tuple[int, ...]] = {}
        self._masks: dict[int, Sequence[bytes | None]] = {}  # by slot, of the chunk in hand
        self._errors: dict[int, str] = {}
        self._bent: set[tuple[tuple[int, ...], int, int]] = set()  # prompt, position, other token
        self._page_owner: dict[int, _Tenant] = {}
        self.num_steps = 0
        self.violations: list[str] = []
        self.history: deque[StepPlan] = deque(maxlen=4096)
        self.closed = False

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def step(self, plan: StepPlan) -> StepResult:
        begin = time.perf_counter()
        number, self.num_steps = self.num_steps, self.num_steps + 1
        self.history.append(plan)
        if self._delay:
            time.sleep(self._delay)
        self._check_plan(plan)
        if number in self._fail_steps:
            raise self._failure
        results = tuple(self._answer(chunk) for chunk in plan.chunks)
        return StepResult(results, time.perf_counter() - begin, self._pass_on(plan.long))

    def close(self) -> None:
        self.closed = True

    def _pass_on(self, long: Chunk | None) -> ChunkResult | None:
        self._num_passed = self._num_passed + 1 if long is self._long else 1
        self._long = long
        if long is None or self._num_passed < self._long_steps:
            return None
        self._long = None
        self._take_in(long)
        return self._answer(long)

    def _demand(self, truth: bool, what: str) -> None:
        if not truth:
            self.violations.append(what)
            raise PlanError(what)

    def _check_plan(self, plan: StepPlan) -> None:
        limit = self._capacity
        self._demand(not self.closed, "a step after close")
        self._demand(plan.num_tokens <= limit.max_step_tokens, f"{plan.num_tokens} tokens")
        chunks = plan.chunks
        if plan.long is not None:
            self._check_long(plan.long)
            chunks = (*chunks, plan.long)
        self._demand(len(chunks) > 0, "an empty plan")
        slots = [chunk.slot for chunk in chunks]
        self._demand(len(set(slots)) == len(slots), f"slots shared within a plan: {slots}")
        pages = [page for chunk in chunks for page in chunk.pages]
        self._demand(len(set(pages)) == len(pages), f"pages shared within a plan: {pages}")
        for chunk in chunks:
            self._check_chunk(chunk)
        for chunk in plan.chunks:
            self._take_in(chunk)

    def _check_long(self, long: Chunk) -> None:
        limit, length = self._capacity, len(long.token_ids)
        self._demand(0 < limit.long_tokens <= length, f"{length} tokens are not long")
        self._demand(length <= limit.max_long_tokens, f"{length} tokens are too long")

    def _check_chunk(self, chunk: Chunk) -> None:
        limit, name = self._capacity, f"slot {chunk.slot}"
        end = chunk.start + len(chunk.token_ids)
        self._demand(0 <= chunk.slot < limit.num_slots, f"{name} does not exist")
        self._demand(len(chunk.token_ids) > 0, f"{name}: no tokens")
        self._demand(end <= limit.context_length, f"{name}: {end} tokens")
        self._demand(
            all(0 <= token < limit.vocab_size for token in chunk.token_ids),
            f"{name}: tokens outside the vocabulary",
        )
        needed = -(-end // limit.page_size)
        enough = len(chunk.pages) >= needed if limit.num_drafts else len(chunk.pages) == needed
        self._demand(enough, f"{name}: {len(chunk.pages)}/{needed} pages")
        if chunk.start == 0 and chunk is not self._long:
            self._tenants[chunk.slot] = _Tenant()
        tenant = self._tenants.get(chunk.slot)
        assert tenant is not None, f"{name} was never begun"
        self._demand(
            chunk.start == len(tenant.token_ids),
            f"{name}: starts at {chunk.start}, has {len(tenant.token_ids)}",
        )
        self._claim_pages(tenant, chunk)

    def _take_in(self, chunk: Chunk) -> None:
        tenant = self._tenants[chunk.slot]
        self._check_drafts(chunk)
        known = len(chunk.token_ids) - chunk.num_drafts
        tenant.token_ids.extend(chunk.token_ids[:known])
        self._check_outputs(tenant, chunk)
        self._open_masks(tenant, chunk)
        self._accept(chunk.slot, chunk.token_ids[known:])

    def _open_masks(self, tenant: _Tenant, chunk: Chunk) -> None:
        name = f"slot {chunk.slot}"
        self._masks.pop(chunk.slot, None)
        self._errors.pop(chunk.slot, None)
        if not chunk.sample:
            self._demand(chunk.masks is None, f"{name}: masks and nothing to draw")
            return
        masked = chunk.masks is not None
        self._demand(tenant.masked in (None, masked), f"{name}: masks come and go")
        tenant.masked = masked
        if chunk.masks is None:
            return
        try:
            masks = chunk.masks.wait()
        except RuntimeError as error:
            self._errors[chunk.slot] = str(error)
            return
        self._demand(len(masks) == 1 + chunk.num_drafts, f"{name}: {len(masks)} masks")
        self._masks[chunk.slot] = masks

    def _check_drafts(self, chunk: Chunk) -> None:
        """They stand behind one known token, are those that were made, and may be used."""
        name, limit = f"slot {chunk.slot}", self._capacity
        made = self._drafts.pop(chunk.slot, ())
        reach = len(chunk.pages) * limit.page_size
        self._demand(chunk.num_drafts in (0, len(chunk.token_ids) - 1), f"{name}: several known")
        drafts = chunk.token_ids[len(chunk.token_ids) - chunk.num_drafts :]
        self._demand(drafts == made[: len(drafts)], f"{name}: not its drafts")
        self._demand(limit.num_drafts > 0 or not chunk.draft_end, f"{name}: wants drafts")
        self._demand(chunk.draft_end <= reach + 2, f"{name}: no page for what makes drafts")
        mid_prompt = not chunk.sample
        self._demand(mid_prompt or chunk.following is None, f"{name}: the token is yet to come")

    def _accept(self, slot: int, drafts: tuple[int, ...]) -> None:
        tenant = self._tenants[slot]
        for place, draft in enumerate(drafts):
            if draft != self._draw(slot, place):
                break
            tenant.token_ids.append(draft)
        # Pages that hold nothing but drafts may be given to others.
        tenant.pages = tenant.pages[: -(-len(tenant.token_ids) // self._capacity.page_size)]

    def _draw(self, slot: int, place: int) -> int:
        """The token after all that are known, `place` accepted drafts among them; -1: none may."""
        tenant = self._tenants[slot]
        position = len(tenant.token_ids)
        scripted = self._output(tenant, position)
        mask = self._masks[slot][place] if slot in self._masks else None
        if is_allowed(scripted, mask):
            return scripted
        vocabulary = range(self._capacity.vocab_size)
        token = next((token for token in vocabulary if is_allowed(token, mask)), -1)
        assert tenant.prompt is not None
        self._bent.add((tenant.prompt, position, token))
        return token

    def _claim_pages(self, tenant: _Tenant, chunk: Chunk) -> None:
        held = len(tenant.pages)
        self._demand(
            list(chunk.pages[:held]) == tenant.pages, f"slot {chunk.slot}: page table changed"
        )
        for page in tenant.pages:
            self._demand(
                self._page_owner[page] is tenant,
                f"slot {chunk.slot}: page {page} was given to another sequence meanwhile",
            )
        for page in chunk.pages[held:]:
            self._demand(0 <= page < self._capacity.num_pages, f"page {page} does not exist")
            self._page_owner[page] = tenant
        tenant.pages = list(chunk.pages)

    def _check_outputs(self, tenant: _Tenant, chunk: Chunk) -> None:
        """What comes after the prompt must be the script's own tokens, fed back."""
        num_prompt, known = chunk.num_prompt_tokens, len(tenant.token_ids)
        self._demand(not chunk.sample or known >= num_prompt, f"slot {chunk.slot}: samples early")
        if known < num_prompt:
            return
        if tenant.prompt is None:
            tenant.prompt = tuple(tenant.token_ids[:num_prompt])
        self._demand(len(tenant.prompt) == num_prompt, f"slot {chunk.slot}: prompt changed")
        for position in range(max(chunk.start, num_prompt), known):
            token = tenant.token_ids[position]
            self._demand(
                token == self._output(tenant, position)
                or (tenant.prompt, position, token) in self._bent,
                f"slot {chunk.slot}: not its own token at {position}",
            )

    def _answer(self, chunk: Chunk) -> ChunkResult:
        tenant = self._tenants[chunk.slot]
        scores = self._prompt_scores(tenant, chunk)
        if not chunk.sample:
            return ChunkResult((), (), scores)
        known = chunk.start + len(chunk.token_ids) - chunk.num_drafts
        accepted = tuple(tenant.token_ids[known:])
        drawn = (*accepted, self._draw(chunk.slot, len(accepted)))
        error = "no token may come" if drawn[-1] < 0 else self._errors.get(chunk.slot)
        if error is not None:
            return ChunkResult((), error=error)
        count = chunk.sampling.logprobs
        logprobs = () if count is None else tuple(self._score(token, count) for token in drawn)
        drafts = self._make_drafts(tenant, chunk.draft_end)
        self._drafts[chunk.slot] = drafts
        return ChunkResult(drawn, logprobs, scores, drafts=drafts)

    def _output(self, tenant: _Tenant, position: int) -> int:
        assert tenant.prompt is not None
        return self._script(tenant.prompt, position - len(tenant.prompt))

    def _make_drafts(self, tenant: _Tenant, end: int) -> tuple[int, ...]:
        first = len(tenant.token_ids) + 1
        positions = range(first, min(end, first + self._capacity.num_drafts))
        prompt = tenant.prompt or ()
        return tuple(
            drafted_token(prompt, position - len(prompt), self._output(tenant, position))
            for position in positions
        )

    def _prompt_scores(self, tenant: _Tenant, chunk: Chunk) -> tuple[TokenLogprob, ...] | None:
        count = chunk.sampling.prompt_logprobs
        if count is None or chunk.start >= chunk.num_prompt_tokens:
            return None
        first, end = max(chunk.start, 1), len(tenant.token_ids)
        own = tenant.token_ids[first : min(end, chunk.num_prompt_tokens)]
        return tuple(self._score(token, count) for token in own)

    def _score(self, token: int, count: int) -> TokenLogprob:
        """A made-up score that depends on the token alone; `top` begins with the token."""
        vocab_size = self._capacity.vocab_size
        best = tuple(
            ((token + rank) % vocab_size, scripted_logprob(token) - rank) for rank in range(count)
        )
        return TokenLogprob(token, scripted_logprob(token), best)


def scripted_logprob(token: int) -> float:
    """The log-probability that a ScriptedRunner reports for a token."""
    return -0.25 - (token % 8) / 4


_DEFAULT_CAPACITY = capacity()
