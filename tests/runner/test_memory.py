from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.config import ConfigError, EngineConfig
from kttrio.experts.recorder import RecorderSettings
from kttrio.experts.scratch import ScratchShape
from kttrio.models.base import CacheShape, ModelShape, StepScratch
from kttrio.models.loading import Estimate
from kttrio.runner.memory import NoRoom, plan_memory
from kttrio.runner.needs import Needs, format_bytes
from tests.machines import machine

GIB = 2**30


def estimate(
    *, context=4096, per_token=1024, per_slot=1 << 20, dense=GIB, experts=2 * GIB, image_token=0
):
    return Estimate(
        shape=ModelShape(
            vocab_size=1000,
            hidden_size=64,
            context_length=context,
            num_layers=4,
            num_experts=8,
            top_k=2,
        ),
        dense_bytes=dense,
        expert_bytes=experts,
        expert_format="bf16",
        expert_activation="bfloat16",
        expert_scratch=ScratchShape(token_bytes=512, product_bytes=512, num_parts=1),
        cache_shape=CacheShape(bytes_per_token=per_token, bytes_per_slot=per_slot),
        step_scratch=StepScratch(per_token=5632, per_pair=1),
        image_token_bytes=image_token,
    )


def plan(engine=None, *, available=16 * GIB, **changes):
    needs = Needs(estimate(**changes), engine or EngineConfig())
    return plan_memory(needs, machine(host=available))


def test_drafts_need_room_until_they_are_verified():
    drafting = estimate()
    drafting = replace(
        drafting,
        shape=drafting.shape._replace(num_drafts=7),
        cache_shape=replace(drafting.cache_shape, bytes_per_draft=1000),
    )
    found = plan_memory(Needs(drafting, EngineConfig()), machine())
    logits = (64 * 8 - 256) * 1000 * 3 * 4  # of every draft in every slot, beyond a block of rows
    more = row(found, "step scratch") - row(plan(), "step scratch")
    assert more == 64 * 8 * 1000 + logits


@pytest.mark.parametrize(
    ("context", "slots", "keys"),
    [(4096, 3, 3 * 4096), (1 << 17, 8, 1 << 18), (1 << 19, 8, 1 << 19)],
)
def test_keys_that_attend_together_need_room_side_by_side(context, slots, keys):
    plain = estimate(context=context)
    gathering = replace(plain, cache_shape=replace(plain.cache_shape, bytes_gathered=256))
    engine = EngineConfig(max_running_requests=slots)
    more, less = (
        row(plan_memory(Needs(found, engine), machine(host=64 * GIB)), "step scratch")
        for found in (gathering, plain)
    )
    assert more - less == keys * 256


def budget(found):
    return found.device_memory.budget_bytes


def row(found, name):
    return next(row.num_bytes for row in found.rows if row.name == name)


def test_a_small_model_gets_all_it_could_ever_use():
    found = plan()
    assert (found.num_slots, found.context_length, found.page_size) == (64, 4096, 16)
    assert found.num_tokens == 64 * 4096
    assert row(found, "KV cache") == 64 * 4096 * 1024
    assert row(found, "recurrent states") == 64 << 20
    assert row(found, "dense weights") == GIB
    assert row(found, "experts") == 2 * GIB
    assert row(found, "expert scratch") == 2048 * 1024
    assert found.total_bytes == sum(r.num_bytes for r in found.rows) <= budget(found)
    assert budget(found) == int(16 * GIB * 0.8)


def test_a_long_context_on_a_cpu_is_held_to_a_usual_length_for_each_request():
    assert plan(context=2**17).num_tokens == 64 * 8192
    one = plan(EngineConfig(max_running_requests=2), context=2**17)
    assert one.num_tokens == 2**17


def test_max_total_tokens_is_kept_up_to_what_could_be_used():
    assert plan(EngineConfig(max_total_tokens=5000)).num_tokens == 5008
    assert plan(EngineConfig(max_total_tokens=10**9)).num_tokens == 64 * 4096


def test_the_context_is_the_shorter_of_flag_and_model():
    assert plan(EngineConfig(context_length=100)).context_length == 100
    assert plan(EngineConfig(context_length=10**6)).context_length == 4096


def test_a_context_that_nobody_asked_for_shrinks_to_the_cache():
    assert plan(EngineConfig(max_total_tokens=1600)).context_length == 1600
    with pytest.raises(ConfigError, match=r"--context-length 2000 needs .* 2000 .* holds 1600"):
        plan(EngineConfig(max_total_tokens=1600, context_length=2000))


def test_a_context_that_does_not_fit_names_the_flag_that_is_in_the_way():
    asked = EngineConfig(max_total_tokens=1600, context_length=2000)
    with pytest.raises(ConfigError, match="; raise --max-total-tokens or lower --context-length"):
        plan(asked)


def test_little_memory_means_a_smaller_cache():
    found = plan(available=4 * GIB, per_token=4096)
    assert found.num_slots <= found.num_pages < 64 * 4096 // 16
    assert found.total_bytes <= budget(found)


def test_a_cache_that_is_too_large_becomes_what_fits():
    found = plan(EngineConfig(max_total_tokens=2**18), per_token=100_000)
    assert (found.max_step_tokens, found.num_slots) == (2048, 64)
    assert 0 <= budget(found) - found.total_bytes < 16 * 100_000


def test_sequences_are_fewer_before_each_has_less_room_than_a_short_chat():
    found = plan(per_token=2**20)
    assert found.num_slots == 8
    assert found.num_tokens >= 8 * 1024
    assert plan(per_token=8 * GIB // 1024).num_slots == 1


@pytest.mark.parametrize(
    ("changes", "engine", "given"),
    [
        ({}, EngineConfig(chunked_prefill_size=2**22), (2**19, 64)),
        ({"per_slot": GIB}, EngineConfig(), (2048, 8)),
        ({"per_slot": 2**28}, EngineConfig(chunked_prefill_size=2**22), (2**19, 16)),
        ({"per_slot": 9 * GIB}, EngineConfig(chunked_prefill_size=2**20), (2**16, 1)),
        ({"per_token": 2**20, "per_slot": GIB}, EngineConfig(context_length=4000), (2048, 4)),
    ],
    ids=["steps", "states", "both", "first states, then steps", "for a context that is wanted"],
)
def test_long_steps_and_many_sequences_are_halved_until_they_fit(changes, engine, given):
    found = plan(engine, **changes)
    assert (found.max_step_tokens, found.num_slots) == given
    assert found.total_bytes <= budget(found)


@pytest.mark.parametrize(
    ("engine", "flag"),
    [
        (EngineConfig(max_running_requests=0), "--max-running-requests is 0"),
        (EngineConfig(chunked_prefill_size=-1), "--chunked-prefill-size is -1"),
        (EngineConfig(page_size=0), "--page-size is 0"),
        (EngineConfig(max_total_tokens=0), "--max-total-tokens is 0"),
        (EngineConfig(context_length=0), "--context-length is 0"),
        (EngineConfig(mem_fraction_static=0.0), "--mem-fraction-static is 0.0"),
        (EngineConfig(mem_fraction_static=1.5), "--mem-fraction-static is 1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(engine, flag):
    with pytest.raises(ConfigError, match=flag):
        plan(engine)


@given(
    available=st.integers(2**28, 2**38),
    slots=st.integers(1, 300),
    context=st.integers(1, 2**18),
    total=st.none() | st.integers(1, 2**20),
)
def test_every_plan_keeps_its_promises(available, slots, context, total):
    engine = EngineConfig(max_running_requests=slots, max_total_tokens=total)
    try:
        found = plan(engine, available=available, context=context, dense=0, experts=0)
    except NoRoom as refusal:
        assert refusal.plan.short  # noqa: PT017
        return
    assert found.total_bytes <= budget(found) <= available
    assert 1 <= found.context_length <= min(found.num_tokens, context)
    assert found.num_tokens < (total or slots * context) + slots * found.page_size


def test_the_largest_image_has_its_room_where_the_model_takes_images():
    assert "image scratch" not in [row.name for row in plan().rows]
    assert row(plan(image_token=1000), "image scratch") == 4096 * 1000
    engine = EngineConfig(max_image_tokens=256)
    assert row(plan(engine, image_token=1000), "image scratch") == 256 * 1000


def plan_recording(mode, num_steps, available=16 * GIB):
    settings = RecorderSettings(mode, num_steps, Path("/tmp"))
    needs = Needs(estimate(), EngineConfig(chunked_prefill_size=512), settings)
    return plan_memory(needs, machine(host=available))


@pytest.mark.parametrize(
    ("mode", "step_bytes"),
    [
        ("per_pass", 4 * 8 * 4),  # layers, experts, int32
        ("stat", 2 * 4 * 8 * 4),  # twice while it is dumped
        ("per_token", 4 * 8 * 4 + 512 * (4 * 2 * 4 + 72)),  # and what each token chose, and which
    ],
)
def test_a_full_recording_has_its_room(mode, step_bytes):
    assert row(plan_recording(mode, 100), "expert recording") == 100 * step_bytes


def test_a_recording_of_everything_cannot_be_planned():
    names = [row.name for row in plan_recording("stat", None).rows]
    assert names == [row.name for row in plan().rows]


def test_a_model_without_attention_needs_no_cache_memory():
    assert row(plan(per_token=0), "KV cache") == 0


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1536, "1.5 KiB"), (5 * GIB, "5.0 GiB"), (2**50, "1024.0 TiB")],
)
def test_bytes_for_people(num_bytes, text):
    assert format_bytes(num_bytes) == text
