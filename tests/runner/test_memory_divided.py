"""Plans over two memories, and over one that both sides share."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.config import EngineConfig
from kttrio.experts.placement import ExpertGrid
from kttrio.runner.graphs import GraphWish
from kttrio.runner.memory import NoRoom, plan_memory
from kttrio.runner.needs import Needs
from kttrio.runner.portion import ALL_ON_HOST, Portion
from tests.machines import GIB, machine, stand_in
from tests.runner.test_memory import estimate

EXPERT = 2**20
GRID = ExpertGrid((True,) * 4, 512)  # 2 GiB of experts
WHOLE = replace(
    estimate(), grid=GRID, slot_bytes=(EXPERT,) * 4, row_bytes=128, intermediate_size=32
)


def plan(portion, on, engine=None, known=WHOLE, graphs=None):
    needs = Needs(known, engine or EngineConfig(), portion=portion, graphs=graphs)
    return plan_memory(needs, on)


def both(gpu=8 * GIB, host=16 * GIB):
    return machine(host=host, gpu=gpu)


def test_what_lives_on_the_device_is_not_on_the_host():
    found = plan(Portion(num_experts=100), both())
    assert found.size("experts") == (2048 - 100) * EXPERT
    assert found.size("device experts") == 100 * EXPERT
    assert {row.where for row in found.rows} == {"cpu", "cuda"}
    on_host = {row.name for row in found.rows if row.where == "cpu"}
    assert on_host == {"experts", "expert scratch", "host staging"}
    host, device = found.memories
    assert found.used(host) + found.used(device) == found.total_bytes
    assert (host.budget_bytes, device.budget_bytes) == (int(16 * GIB * 0.95), int(8 * GIB * 0.8))


def test_auto_takes_what_is_left_and_leaves_the_cache_half_of_it_at_most():
    long = replace(WHOLE, shape=WHOLE.shape._replace(context_length=2**18))
    found = plan(Portion(num_experts=None), both(gpu=4 * GIB), known=long)
    (_, device) = found.memories
    assert 0 <= device.budget_bytes - found.used(device) < EXPERT
    assert 0 < found.num_device_experts < GRID.total
    assert found.context_length == 2**18, "one sequence may be as long as the model allows"
    fixed = plan(Portion(num_experts=0), both(gpu=4 * GIB), known=long)
    assert found.size("KV cache") < fixed.size("KV cache")


def test_auto_keeps_to_the_cache_that_was_asked_for():
    found = plan(Portion(num_experts=None), both(gpu=4 * GIB), EngineConfig(max_total_tokens=8192))
    assert found.num_tokens == 8192


def test_where_all_experts_fit_nothing_has_to_come_and_go():
    wanted = Portion(
        num_experts=None, num_ring_slots=64, num_spare_slots=4, long_tokens=9, max_long_tokens=99
    )
    found = plan(wanted, both(gpu=40 * GIB))
    assert found.num_device_experts == GRID.total
    assert found.size("experts") == 0
    assert (found.num_ring_slots, found.num_spare_slots, found.max_long_tokens) == (0, 0, 0)


def test_one_memory_holds_each_expert_once_on_whichever_side():
    few, all_ = (plan(Portion(num_experts=n), stand_in()) for n in (8, None))
    assert all_.num_device_experts == GRID.total
    for found in (few, all_):
        assert len(found.memories) == 1
        assert found.size("experts") + found.size("device experts") == WHOLE.expert_bytes


def test_a_large_number_of_experts_makes_the_cache_smaller_but_is_kept():
    long = replace(WHOLE, shape=WHOLE.shape._replace(context_length=2**18))
    many, few = (plan(Portion(num_experts=n), both(gpu=4 * GIB), known=long) for n in (1500, 100))
    assert (many.num_device_experts, few.num_device_experts) == (1500, 100)
    assert many.num_tokens < few.num_tokens


def test_the_ring_gives_way_unless_it_is_asked_for():
    engine = EngineConfig(max_running_requests=1, chunked_prefill_size=256)
    asked = Portion(num_experts=1000, num_ring_slots=64)
    others = plan(replace(asked, num_ring_slots=2), both(), engine)
    left = others.used(others.device_memory) - others.size("KV cache") + 20 * EXPERT
    tight = both(gpu=int(left / 0.8))
    assert plan(asked, both(), engine).num_ring_slots == 64
    assert plan(asked, tight, engine).num_ring_slots == 16
    with pytest.raises(NoRoom):
        plan(replace(asked, is_ring_fixed=True), tight, engine)


def test_captured_steps_have_their_room():
    with_, without = (
        plan(Portion(num_experts=8), both(), graphs=wish) for wish in (GraphWish((), None), None)
    )
    assert with_.graph_sizes == (1, 2, 4, 8, 16, 32, 64)
    assert without.graph_sizes == ()
    assert with_.size("decode graphs") > 0 == without.size("decode graphs")


def test_the_memory_that_is_short_is_named():
    with pytest.raises(NoRoom) as refused:
        plan(Portion(num_experts=2000), both(gpu=GIB))
    assert refused.value.plan.short == ("cuda",)
    with pytest.raises(NoRoom) as refused:
        plan(Portion(num_experts=0), both(host=GIB))
    assert refused.value.plan.short == ("cpu",)


@given(
    host=st.integers(2**28, 2**36),
    gpu=st.none() | st.integers(2**28, 2**36),
    slots=st.integers(1, 100),
    context=st.integers(1, 2**18),
    wanted=st.none() | st.integers(0, GRID.total),
    ring=st.sampled_from([0, 2, 64]),
    long=st.sampled_from([0, 100, 5000]),
)
def test_every_plan_keeps_its_promises(host, gpu, slots, context, wanted, ring, long):
    portion = replace(
        ALL_ON_HOST,
        num_experts=wanted,
        num_ring_slots=ring,
        long_tokens=long if ring else 0,
        max_long_tokens=max(long, 2**15) if ring and long else 0,
    )
    known = replace(WHOLE, shape=WHOLE.shape._replace(context_length=context), dense_bytes=2**26)
    on = stand_in(host=host) if gpu is None else both(gpu=gpu, host=host)
    try:
        found = plan(portion, on, EngineConfig(max_running_requests=slots), known=known)
    except NoRoom as refusal:
        assert refusal.plan.short  # noqa: PT017
        return
    for memory in found.memories:
        assert found.used(memory) <= memory.budget_bytes <= memory.available_bytes
    assert wanted in (None, found.num_device_experts)
    assert found.size("experts") == WHOLE.expert_bytes - found.num_device_experts * EXPERT
    assert found.long_tokens <= found.max_long_tokens
    assert (found.long_tokens > 0) <= (found.num_ring_slots > 0)
    assert 1 <= found.context_length <= min(found.num_tokens, context)
