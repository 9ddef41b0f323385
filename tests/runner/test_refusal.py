"""What is said when a plan does not fit. That mends of real models help: tests/cli."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kttrio.config import EngineConfig
from kttrio.experts.placement import ExpertGrid
from kttrio.experts.recorder import RecorderSettings
from kttrio.runner.memory import NoRoom, plan_memory
from kttrio.runner.needs import Needs
from kttrio.runner.portion import Portion
from kttrio.runner.refusal import Variant, explain
from tests.machines import GIB, machine
from tests.runner.test_memory import estimate


def refusal(needs, on=None, variants=()):
    on = on or machine()
    with pytest.raises(NoRoom) as refused:
        plan_memory(needs, on)
    return explain(refused.value, needs, on, variants)


def needs(engine=None, recording=None, portion=None, **changes):
    return Needs(estimate(**changes), engine or EngineConfig(), recording, portion)


def mends(*args, **kwargs):
    return refusal(*args, **kwargs).rpartition("; it would start with ")[2].split(", or with ")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"experts": 20 * GIB}, "experts 20.0 GiB"),
        ({"dense": 20 * GIB}, "dense weights 20.0 GiB"),
        ({"per_slot": 20 * GIB}, "recurrent states 20.0 GiB"),
        ({"per_token": GIB}, "KV cache 16.0 GiB"),
    ],
)
def test_the_numbers_are_named(changes, named):
    message = refusal(needs(**changes))
    for word in (
        *(named, " GiB more than 80% of the 16.0 GiB available (cpu)"),
        *("--max-running-requests 1 ", "--chunked-prefill-size 256 "),
    ):
        assert word in message


def test_what_would_help_depends_on_what_is_short():
    assert mends(needs(experts=14 * GIB)) == ["--mem-fraction-static 0.94"]
    assert mends(needs(EngineConfig(context_length=100), experts=20 * GIB)) == [
        "about 26.3 GiB available"
    ]


def test_a_context_that_is_too_long_has_its_longest_length_named():
    (mend,) = mends(
        needs(EngineConfig(context_length=4000), per_token=2**20, experts=0),
        machine(host=4 * GIB),
    )
    longest = int(mend.removeprefix("--context-length "))
    assert 2000 < longest < 4000


def test_images_and_recordings_that_are_too_large_name_their_flags():
    (mend,) = mends(needs(image_token=4 << 20))
    assert 256 <= int(mend.removeprefix("--max-image-tokens ")) < 4096
    recording = RecorderSettings("per_token", 10**6, Path("/tmp"))
    (mend,) = mends(needs(recording=recording))
    steps = int(mend.removeprefix("--expert-distribution-recorder-buffer-size "))
    assert 1 < steps < 10**6


def test_a_variant_is_named_alone_where_it_is_enough_and_else_with_what_it_needs():
    large = needs(experts=40 * GIB)
    small, medium = (Variant("--kt-method int4", needs(experts=size * GIB)) for size in (8, 14))
    assert mends(large, variants=[small]) == ["--kt-method int4"]
    assert mends(large, variants=[medium])[0] == "--kt-method int4 and --mem-fraction-static 0.94"
    assert len(mends(large, variants=[medium])) <= 3


def test_experts_on_the_device_give_way_or_make_way_on_the_host():
    grid = ExpertGrid((True,) * 4, 256)
    known = replace(
        estimate(dense=GIB), grid=grid, slot_bytes=(2**21,) * 4, row_bytes=128, intermediate_size=8
    )

    def divided(**portion):
        return Needs(known, EngineConfig(), portion=Portion(**portion))

    gpu = machine(host=16 * GIB, gpu=3 * GIB)
    first, *_ = mends(divided(num_experts=1024), gpu)
    assert 0 < int(first.removeprefix("--kt-num-gpu-experts ")) < 256
    first, *_ = mends(divided(num_experts=1024, is_ratio=True), gpu)
    assert 0 < float(first.removeprefix("--kt-gpu-experts-ratio ")) < 1
    first, *_ = mends(divided(num_experts=4), machine(host=2 * GIB, gpu=8 * GIB))
    assert first == "--kt-num-gpu-experts auto"


def test_both_memories_are_named_where_both_are_short():
    known = replace(
        estimate(dense=20 * GIB, experts=30 * GIB),
        grid=ExpertGrid((True,) * 4, 256),
        slot_bytes=(30 * 2**20,) * 4,
        row_bytes=128,
        intermediate_size=8,
    )
    wanted = Needs(known, EngineConfig(), portion=Portion(num_experts=0))
    message = refusal(wanted, machine(host=8 * GIB, gpu=8 * GIB))
    assert "available (cpu)" in message
    assert "available (cuda)" in message
    assert "free on the GPU and about" in message
