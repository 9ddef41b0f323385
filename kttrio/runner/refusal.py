"""What is said when a plan does not fit: the numbers, and the flags with which it would.

Every mend is tried before it is named, by planning with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from kttrio.config import ConfigError
from kttrio.runner.device import Machine
from kttrio.runner.memory import MemoryPlan, NoRoom, plan_memory
from kttrio.runner.needs import Needs, format_bytes

_NUM_MENDS = 3
_MOST_PERCENT = 95  # of memory; the process itself and what others do need the rest
_WORTH_NAMING = 0.02  # of what is needed in all
_LEAST_CONTEXT = 1024  # tokens; a shorter one mends nothing
_LEAST_IMAGE = 256  # tokens, the least of --max-image-tokens
_PLENTY = 2**60  # bytes
_STEP = 2**30 // 10  # a tenth of what is shown


class Variant(NamedTuple):
    """Another flag, and what would be needed with it."""

    flag: str
    needs: Needs


def explain(error: NoRoom, needs: Needs, machine: Machine, variants: Iterable[Variant]) -> str:
    """The whole message, with at most three mends."""
    found = list(islice(_mends(needs, machine, variants), _NUM_MENDS))
    return f"{_numbers(error)}; it would start with {', or with '.join(found)}"


def _numbers(error: NoRoom) -> str:
    plan, engine = error.plan, error.engine
    smallest = (
        f"--max-running-requests {engine.max_running_requests} and --chunked-prefill-size "
        f"{engine.chunked_prefill_size}"
    )
    tight = " and ".join(_shortage(plan, where) for where in plan.short)
    return f"the model does not fit: already with {smallest} {tight}"


def _shortage(plan: MemoryPlan, where: str) -> str:
    """What one memory lacks."""
    (memory,) = (memory for memory in plan.memories if memory.where == where)
    used = plan.used(memory)
    rows = {row.name: row.num_bytes for row in plan.rows if row.where == where}
    named = {name: size for name, size in rows.items() if size >= used * _WORTH_NAMING}
    if rest := used - sum(named.values()):
        named["all else"] = rest
    needs = ", ".join(f"{name} {format_bytes(size)}" for name, size in named.items())
    share = memory.budget_bytes / max(memory.available_bytes, 1)
    return (
        f"{needs} make {format_bytes(used)}, {format_bytes(used - memory.budget_bytes)} more than "
        f"{share:.0%} of the {format_bytes(memory.available_bytes)} available ({where})"
    )


def _mends(needs: Needs, machine: Machine, variants: Iterable[Variant]) -> Iterator[str]:
    """Flags that are enough by themselves; where there are none, two together, or memory."""
    variants = list(variants)
    alone = [*_single(needs, machine, variants)]
    yield from alone
    if alone:
        return
    for variant in variants:
        for more in _share(variant.needs, machine):
            yield f"{variant.flag} and {more}"
    yield _memory(needs, machine)
    for variant in variants:
        yield f"{variant.flag} and {_memory(variant.needs, machine)}"


def _single(needs: Needs, machine: Machine, variants: Iterable[Variant]) -> Iterator[str]:
    yield from _experts(needs, machine)
    yield from _share(needs, machine)
    yield from (each.flag for each in variants if _fits(each.needs, machine))
    yield from _prompts(needs, machine)
    yield from _requests(needs, machine)


def _experts(needs: Needs, machine: Machine) -> Iterator[str]:
    """Fewer experts on the device; or else more, which the host need not hold."""
    portion, grid = needs.portion, needs.estimate.grid
    if portion is None or not portion.num_experts:
        return
    unit = grid.total // 100 if portion.is_ratio else len(grid.layers)
    flag = "--kt-gpu-experts-ratio {:g}" if portion.is_ratio else "--kt-num-gpu-experts {:g}"

    def fits(units: int) -> bool:
        num_experts = int(grid.total * units / 100) if portion.is_ratio else units * unit
        return _fits(_with_portion(needs, num_experts=num_experts), machine)

    fewer = _largest(1 if portion.num_spare_slots else 0, (portion.num_experts - 1) // unit, fits)
    if fewer is not None:
        yield flag.format(fewer / 100 if portion.is_ratio else fewer)
    elif not portion.is_ratio and _fits(_with_portion(needs, num_experts=None), machine):
        yield "--kt-num-gpu-experts auto"


def _share(needs: Needs, machine: Machine) -> Iterator[str]:
    """The least larger share of memory."""
    now = math.ceil(100 * needs.engine.mem_fraction_static)

    def fits(less: int) -> bool:
        share = (_MOST_PERCENT - less) / 100
        return _fits(_with_engine(needs, mem_fraction_static=share), machine)

    less = _largest(0, _MOST_PERCENT - now - 1, fits)
    if less is not None:
        yield f"--mem-fraction-static {(_MOST_PERCENT - less) / 100:g}"


def _prompts(needs: Needs, machine: Machine) -> Iterator[str]:
    """Less for experts and long prompts on their way through the device."""
    if needs.portion is None or not needs.portion.num_ring_slots:
        return
    if _fits(_with_portion(needs, long_tokens=0, max_long_tokens=0), machine):
        yield "--kt-gpu-prefill-token-threshold 0"
    elif _fits(replace(needs, portion=needs.portion.alone()), machine):
        yield "--kt-ring-experts 0 --kt-gpu-prefill-token-threshold 0"


def _requests(needs: Needs, machine: Machine) -> Iterator[str]:
    """Less room for what requests may bring."""
    context = _largest(
        _LEAST_CONTEXT,
        needs.context - 1,
        lambda n: _fits(_with_engine(needs, context_length=n), machine),
    )
    if context is not None:
        yield f"--context-length {context}"
    if needs.estimate.image_token_bytes:
        image = _largest(
            _LEAST_IMAGE,
            needs.engine.max_image_tokens - 1,
            lambda n: _fits(_with_engine(needs, max_image_tokens=n), machine),
        )
        if image is not None:
            yield f"--max-image-tokens {image}"
    yield from _recording(needs, machine)


def _recording(needs: Needs, machine: Machine) -> Iterator[str]:
    """A shorter memory of the steps."""
    recording = needs.recording
    if recording is None or recording.num_steps is None:
        return
    steps = _largest(
        1,
        recording.num_steps - 1,
        lambda n: _fits(replace(needs, recording=recording._replace(num_steps=n)), machine),
    )
    if steps is not None:
        yield f"--expert-distribution-recorder-buffer-size {steps}"


def _memory(needs: Needs, machine: Machine) -> str:
    """How much there would have to be, of each memory that is too small."""
    plenty = replace(machine, host_bytes=_PLENTY)
    found = []
    if machine.device_bytes is not None:
        plenty = replace(plenty, device_bytes=_PLENTY)
        device = _least_bytes(lambda n: _fits(needs, replace(plenty, device_bytes=n)))
        if device > machine.device_bytes:
            found.append(f"about {format_bytes(device)} free on the GPU")
    host = _least_bytes(lambda n: _fits(needs, replace(plenty, host_bytes=n)))
    if host > machine.host_bytes:
        found.append(f"about {format_bytes(host)} available")
    return " and ".join(found)


def _least_bytes(fits: Callable[[int], bool]) -> int:
    """In steps of what is shown of a size, so that what is shown is enough."""
    less = _largest(0, _PLENTY // _STEP - 1, lambda n: fits(_PLENTY - n * _STEP))
    return _PLENTY - (less or 0) * _STEP


def _largest(least: int, most: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number that fits, where smaller ones fit all the more; None if none does."""
    if most < least or not fits(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        if fits(middle):
            least = middle
        else:
            most = middle - 1
    return least


def _fits(needs: Needs, machine: Machine) -> bool:
    try:
        plan_memory(needs, machine)
    except ConfigError:
        return False
    return True


def _with_engine(needs: Needs, **changes: Any) -> Needs:
    return replace(needs, engine=replace(needs.engine, **changes))


def _with_portion(needs: Needs, **changes: Any) -> Needs:
    return (
        needs
        if needs.portion is None
        else replace(needs, portion=replace(needs.portion, **changes))
    )
