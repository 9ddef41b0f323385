"""Where the memory goes, decided before a single weight is read.

The rows of needs.py in one memory or in two: the host's, and the device's where it has its own.
What is said when they do not fit is refusal.py's; how much memory there is, device.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import NamedTuple

from kttrio.config import ConfigError, EngineConfig
from kttrio.runner.device import Machine
from kttrio.runner.needs import (
    OF_PROMPTS,
    OF_STEPS,
    MemoryRow,
    Needs,
    device_rows,
    expert_rows,
    host_rows,
    page_bytes,
    pages_for,
    total,
)
from kttrio.runner.portion import ALL_ON_HOST

_USUAL_TOKENS_PER_REQUEST = 8192
_SHORT_STEP = 256  # tokens; shorter ones save little and cost much
_SHORT_CHAT = 1024  # tokens; sequences with less room than this are better fewer
_HOST_SHARE = 0.95  # of the host's memory, where --mem-fraction-static is about a GPU's


class Memory(NamedTuple):
    """One that the rows of a plan share."""

    where: str
    available_bytes: int
    budget_bytes: int
    """The share of it that the rows together stay within."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What is allocated, and what the engine may count on."""

    rows: tuple[MemoryRow, ...]
    memories: tuple[Memory, ...]
    """The host's; then the device's, where that has its own."""
    num_slots: int
    num_pages: int
    page_size: int
    context_length: int
    max_step_tokens: int
    num_device_experts: int = 0
    """Over all layers."""
    num_ring_slots: int = 0
    num_spare_slots: int = 0
    long_tokens: int = 0
    max_long_tokens: int = 0
    graph_sizes: tuple[int, ...] = ()
    """Sequences of the decode steps that are captured."""

    @property
    def device_memory(self) -> Memory:
        """The one of the KV cache and the dense layers."""
        return self.memories[-1]

    @property
    def total_bytes(self) -> int:
        return sum(row.num_bytes for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens the KV cache holds."""
        return self.num_pages * self.page_size

    @property
    def short(self) -> tuple[str, ...]:
        """Where the rows need more than the budget."""
        return tuple(
            memory.where for memory in self.memories if self.used(memory) > memory.budget_bytes
        )

    def used(self, memory: Memory) -> int:
        """Bytes of its rows."""
        return total(row for row in self.rows if row.where == memory.where)

    def size(self, name: str) -> int:
        """Of the row of that name; 0 where there is none."""
        return total(row for row in self.rows if row.name == name)


class NoRoom(ConfigError):
    """A plan that does not fit, with everything made as small as it may become."""

    def __init__(self, plan: MemoryPlan, engine: EngineConfig) -> None:
        super().__init__("the model does not fit")
        self.plan, self.engine = plan, engine


def find_memories(machine: Machine, mem_fraction_static: float) -> tuple[Memory, ...]:
    """What the plan may divide. With a GPU the flag is about its memory."""
    host, own = machine.host_bytes, machine.device_bytes
    if own is None:
        return (Memory("cpu", host, int(host * mem_fraction_static)),)
    return (
        Memory("cpu", host, int(host * _HOST_SHARE)),
        Memory(machine.where.type, own, int(own * mem_fraction_static)),
    )


def plan_memory(needs: Needs, machine: Machine) -> MemoryPlan:
    """Divide the budgets: weights, every slot's state and scratch first, then the KV cache.

    The KV cache is never larger than all slots together could use. Where `max_total_tokens` leaves
    it open it takes what is left; on a CPU, whose memory others want too, and where experts take
    what is left, at most 8192 tokens for each running request, or one whole context; the experts
    have half of it at least, if no more than one context stands against that. Where memory
    is short the plan has fewer tokens in the cache, then shorter steps and fewer sequences, than
    the flags ask for. Raises NoRoom where nothing helps, ConfigError for flags that disagree.
    """
    _check(needs.engine)
    _check_context(needs.engine, needs.estimate.shape.context_length)
    while True:
        plan = divide_memory(needs, machine)
        if not plan.short:
            return plan
        needs = _smaller(needs, plan)


def divide_memory(needs: Needs, machine: Machine) -> MemoryPlan:
    """The plan for these settings; it exceeds a budget where a short chat in each slot is too
    much."""
    engine, portion = needs.engine, needs.portion or ALL_ON_HOST
    memories = find_memories(machine, engine.mem_fraction_static)
    where = memories[-1].where
    others = [*host_rows(needs), *device_rows(needs, where)]
    asked = [*expert_rows(needs, portion.num_experts or 0, where), *others]
    num_pages = _num_kv_pages(needs, memories[-1], asked)
    others.append(MemoryRow("KV cache", where, num_pages * page_bytes(needs)))
    resident = portion.num_experts
    if resident is None:
        resident = _room_for_experts(needs, memories, [*expert_rows(needs, 0, where), *others])
    if portion != portion.alone() and resident == needs.estimate.grid.total:
        return divide_memory(replace(needs, portion=portion.alone()), machine)
    return MemoryPlan(
        rows=(*expert_rows(needs, resident, where), *others),
        memories=memories,
        num_slots=engine.max_running_requests,
        num_pages=num_pages,
        page_size=engine.page_size,
        context_length=min(needs.context, num_pages * engine.page_size),
        max_step_tokens=engine.chunked_prefill_size,
        num_device_experts=resident,
        num_ring_slots=portion.num_ring_slots,
        num_spare_slots=portion.num_spare_slots,
        long_tokens=portion.long_tokens,
        max_long_tokens=portion.max_long_tokens,
        graph_sizes=needs.graph_sizes,
    )


def _smaller(needs: Needs, plan: MemoryPlan) -> Needs:
    """With half of what takes most where memory is short: of the step, the sequences, the room for
    experts and prompts on their way. NoRoom when each is at its least.

    The KV cache is not asked: the plan's has a short chat for each sequence, or what must be.
    """
    short = [row for row in plan.rows if row.where in plan.short]
    costs = [
        (total(row for row in short if row.name in names), smaller)
        for smaller, names in _elastic(needs)
    ]
    if not costs:
        raise NoRoom(plan, needs.engine)
    return max(costs, key=itemgetter(0))[1]


def _elastic(needs: Needs) -> Iterator[tuple[Needs, tuple[str, ...]]]:
    """What may be less than was asked for, halved, and the rows that are smaller then."""
    engine, portion = needs.engine, needs.portion
    slots, step = engine.max_running_requests, engine.chunked_prefill_size
    if slots > 1:
        fewer = replace(engine, max_running_requests=slots // 2)
        yield replace(needs, engine=fewer), ("recurrent states", "KV cache")
    if step > _SHORT_STEP:
        shorter = replace(engine, chunked_prefill_size=max(step // 2, _SHORT_STEP))
        yield replace(needs, engine=shorter), OF_STEPS
    for smaller in portion.smaller() if portion else ():
        yield replace(needs, portion=smaller), OF_PROMPTS


def _room_for_experts(needs: Needs, memories: tuple[Memory, ...], rows: Iterable[MemoryRow]) -> int:
    """How many fit on the device beside all other rows. Where both sides share one memory, an
    expert takes as much on either: all do."""
    grid, device = needs.estimate.grid, memories[-1]
    if len(memories) == 1:
        return grid.total
    left = device.budget_bytes - total(row for row in rows if row.where == device.where)
    return min(max(left, 0) // max(needs.estimate.slot_bytes), grid.total)


def _num_kv_pages(needs: Needs, memory: Memory, rows: Iterable[MemoryRow]) -> int:
    """As many as are wanted and fit beside the other rows; at least those that there must be."""
    leaves_some = (needs.portion or ALL_ON_HOST).num_experts is None
    is_modest = memory.where == "cpu" or leaves_some
    wanted = _wanted_pages(needs.engine, needs.context, is_modest=is_modest)
    if not page_bytes(needs):
        return wanted
    left = memory.budget_bytes - total(row for row in rows if row.where == memory.where)
    least = _least_pages(needs.engine, needs.context)
    affordable = left // page_bytes(needs)
    if leaves_some and needs.engine.max_total_tokens is None:
        whole = pages_for(needs.context, needs.engine)
        wanted = min(wanted, max(affordable // 2, whole))
    return min(wanted, max(affordable, least))


def _wanted_pages(engine: EngineConfig, context: int, *, is_modest: bool) -> int:
    slots = engine.max_running_requests
    wanted = slots * pages_for(context, engine)
    if engine.max_total_tokens is not None:
        return min(wanted, pages_for(engine.max_total_tokens, engine))
    if is_modest:
        usual = pages_for(min(context, _USUAL_TOKENS_PER_REQUEST), engine)
        return min(wanted, max(slots * usual, pages_for(context, engine)))
    return wanted


def _least_pages(engine: EngineConfig, context: int) -> int:
    """A short chat in each of several sequences (one alone is content with a page), and the length
    that was asked for in one of them."""
    slots = engine.max_running_requests
    each = pages_for(min(context, _SHORT_CHAT), engine) if slots > 1 else 1
    asked = 0 if engine.context_length is None else pages_for(context, engine)
    return max(slots * each, asked)


def _check(engine: EngineConfig) -> None:
    at_least_one = {
        "--max-running-requests": engine.max_running_requests,
        "--chunked-prefill-size": engine.chunked_prefill_size,
        "--page-size": engine.page_size,
        "--max-total-tokens": engine.max_total_tokens,
        "--context-length": engine.context_length,
    }
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if not 0.0 < engine.mem_fraction_static <= 1.0:
        raise ConfigError(
            f"--mem-fraction-static is {engine.mem_fraction_static}; it must be above 0, at most 1"
        )


def _check_context(engine: EngineConfig, made_for: int) -> None:
    """A sequence of the length that was asked for must fit into a cache of the size asked for."""
    if engine.context_length is None or engine.max_total_tokens is None:
        return
    context = min(engine.context_length, made_for)
    holds = pages_for(engine.max_total_tokens, engine) * engine.page_size
    if holds < context:
        raise ConfigError(
            f"--context-length {engine.context_length} needs a KV cache of {context} tokens, but "
            f"it holds {holds}; raise --max-total-tokens or lower --context-length"
        )
