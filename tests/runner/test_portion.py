"""What the placement flags ask for, what they refuse, and what they say aloud."""

from __future__ import annotations

import pytest
import torch

from kttrio.config import ConfigError, PlacementConfig
from kttrio.experts.placement import ExpertGrid
from kttrio.experts.recording import write_stat
from kttrio.models.base import ModelShape
from kttrio.runner.portion import (
    ALL_ON_HOST,
    Portion,
    choose_mask,
    note_portion,
    read_portion,
    recorded_counts,
)

GRID = ExpertGrid((False, True, True, True), 8)  # 24 experts
SHAPE = ModelShape(
    vocab_size=9, hidden_size=8, context_length=9000, num_layers=4, num_experts=8, top_k=2
)


def read(kind="cpu", **flags):
    return read_portion(PlacementConfig(**flags), kind, GRID, SHAPE)


def noted(caplog, kind="cpu", **flags):
    portion = read(kind, **flags)
    holds_all = portion is not None and portion.num_experts == GRID.total
    note_portion(PlacementConfig(**flags), kind, holds_all=holds_all)
    return [record.message for record in caplog.records]


def test_a_cpu_alone_has_no_portion_whatever_is_asked(caplog):
    flags = {"kt_num_gpu_experts": 99, "kt_gpu_prefill_token_threshold": 5}
    assert read("none", **flags) is None
    (message,) = noted(caplog, "none", **flags)
    assert message.startswith(
        "without meaning here: --kt-num-gpu-experts, --kt-gpu-prefill-token-threshold (no GPU, "
    )


def test_a_stand_in_has_what_it_is_told_to_and_nothing_else(caplog):
    assert read() is None
    assert read(kt_num_gpu_experts=0) is None
    assert read(kt_num_gpu_experts=2) == Portion(num_experts=6)
    assert read(kt_num_gpu_experts="auto") == Portion(num_experts=None)
    assert read(kt_max_deferred_experts_per_token=1) == Portion(num_experts=0, max_deferred=1)
    assert noted(caplog, kt_num_gpu_experts=2) == []


def test_a_gpu_has_experts_and_a_ring_by_default():
    assert read("cuda") == Portion(
        num_experts=None, num_ring_slots=8, long_tokens=2048, max_long_tokens=9000
    )
    assert read("cuda", kt_num_gpu_experts=0, kt_ring_experts=0) == Portion(
        num_experts=0, is_ring_fixed=True
    )
    assert read("cuda", kt_gpu_prefill_token_threshold=0) == Portion(
        num_experts=None, num_ring_slots=8
    )


def test_the_ratio_goes_first_and_is_rounded_down(caplog):
    flags = {"kt_gpu_experts_ratio": 0.3, "kt_num_gpu_experts": 1}
    assert read(**flags) == Portion(num_experts=7, is_ratio=True)
    assert noted(caplog, **flags) == [
        "without meaning here: --kt-num-gpu-experts (--kt-gpu-experts-ratio goes first)"
    ]


def test_a_threshold_brings_a_ring_and_room_for_long_prompts():
    found = read(kt_gpu_prefill_token_threshold=100)
    assert (found.num_ring_slots, found.long_tokens, found.max_long_tokens) == (8, 100, 9000)
    assert read(kt_gpu_prefill_token_threshold=100, kt_ring_experts=3).num_ring_slots == 3
    beyond = read(kt_gpu_prefill_token_threshold=10**6)
    assert (beyond.long_tokens, beyond.max_long_tokens) == (10**6, 10**6)


def test_with_all_experts_on_the_device_nothing_has_to_pass(caplog):
    flags = {"kt_num_gpu_experts": 8, "kt_gpu_prefill_token_threshold": 100}
    assert read(**flags) == Portion(num_experts=24)
    (message,) = noted(caplog, **flags)
    assert "--kt-gpu-prefill-token-threshold (all experts stay on the device" in message


def test_dynamic_update_has_spare_slots():
    flags = {"kt_num_gpu_experts": 2, "kt_enable_dynamic_expert_update": True}
    assert read(**flags).num_spare_slots > 0
    assert read("cuda", kt_enable_dynamic_expert_update=True).num_spare_slots > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kt_num_gpu_experts": 9}, "9 in each layer, but a layer has 8 experts"),
        ({"kt_enable_dynamic_expert_update": True}, "none of the 24 experts are to be on"),
        (
            {"kt_enable_dynamic_expert_update": True, "kt_gpu_experts_ratio": 1.0},
            "all of the 24 experts are to be on",
        ),
        (
            {
                "kt_enable_dynamic_expert_update": True,
                "kt_num_gpu_experts": 2,
                "kt_dynamic_update_rule": "last-chunk",
            },
            "last-chunk looks at steps with long prompts; give --kt-gpu-prefill-token-threshold",
        ),
        ({"kt_gpu_prefill_token_threshold": 9, "kt_ring_experts": 0}, "or a threshold of 0"),
        ({"kt_ring_experts": 1}, "--kt-ring-experts 1: while one is read"),
        ({"kt_max_deferred_experts_per_token": 3}, "a token has 2 experts"),
    ],
)
def test_what_cannot_work_is_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        read(**flags)


def test_flags_of_dynamic_update_without_it_are_named(caplog, tmp_path):
    flags = {
        "kt_num_gpu_experts": 2,
        "kt_dynamic_update_rule": "decayed",
        "kt_expert_state": tmp_path / "state.pt",
        "init_expert_location": str(tmp_path / "counts.pt"),
    }
    first, second = noted(caplog, **flags)
    assert "--kt-dynamic-update-rule, --kt-expert-state (only with --kt-enable-dyn" in first
    assert "--init-expert-location (only --kt-expert-placement-strategy frequency" in second


def test_the_ring_and_long_prompts_give_way_by_halves():
    portion = Portion(num_experts=1, num_ring_slots=5, long_tokens=100, max_long_tokens=150)
    assert list(portion.smaller()) == [
        Portion(num_experts=1, num_ring_slots=2, long_tokens=100, max_long_tokens=150),
        Portion(num_experts=1, num_ring_slots=5, long_tokens=100, max_long_tokens=100),
    ]
    least = Portion(num_experts=1, num_ring_slots=2, long_tokens=100, max_long_tokens=100)
    assert list(least.smaller()) == []
    fixed = Portion(num_experts=1, num_ring_slots=64, is_ring_fixed=True)
    assert list(fixed.smaller()) == []
    assert portion.alone() == Portion(num_experts=1)
    assert ALL_ON_HOST.alone() == ALL_ON_HOST


def test_a_mask_has_a_row_for_each_layer_with_experts():
    mask = choose_mask(None, GRID, 7, None)
    assert mask.shape == (3, 8)
    assert mask.sum(1).tolist() == [3, 2, 2]
    counts = torch.zeros(4, 8)
    counts[2, 5:] = 10
    assert choose_mask("frequency", GRID, 3, counts).nonzero().tolist() == [[1, 5], [1, 6], [1, 7]]


def test_recorded_counts_are_of_this_model_or_refused(tmp_path):
    assert recorded_counts(PlacementConfig(init_expert_location="trivial"), GRID) is None
    ours, theirs = (
        write_stat(tmp_path, torch.ones(2, *shape, dtype=torch.int32))
        for shape in (GRID.shape, (3, 8))
    )
    found = recorded_counts(PlacementConfig(init_expert_location=str(ours)), GRID)
    assert torch.equal(found, torch.full((4, 8), 2))
    with pytest.raises(ConfigError, match=r"is of 3 x 8 experts, the model has 4 x 8"):
        recorded_counts(PlacementConfig(init_expert_location=str(theirs)), GRID)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"no file of torch")
    with pytest.raises(ConfigError, match=r"--init-expert-location: .*damaged\.pt is no torch"):
        recorded_counts(PlacementConfig(init_expert_location=str(damaged)), GRID)
