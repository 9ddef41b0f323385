"""Which experts should change sides: what no sequence of choices may break."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kttrio.experts.choice import (
    DecayedCounts,
    DecayedRule,
    LastChunkRule,
    Seat,
    StepTokens,
    Swap,
    choose_swaps,
    swapped,
)
from kttrio.experts.placement import ExpertGrid, frequency, uniform


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Counts and a mask."""
    num_layers, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    size = num_layers * num_experts
    counts = draw(st.lists(st.integers(0, 40), min_size=size, max_size=size))
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    shape = (num_layers, num_experts)
    return torch.tensor(counts).view(shape), torch.tensor(mask).view(shape)


def settled(counts: Tensor, mask: Tensor, *, limit: int, margin: float = 0.0) -> Tensor:
    """Where round after round ends; every round must gain, so there is an end."""
    while swaps := choose_swaps(counts, mask, limit=limit, margin=margin):
        mask = swapped(mask, swaps)
    return mask


@given(tables(), st.integers(0, 20), st.sampled_from([0.0, 1.0, 3.0]))
def test_every_swap_gains_and_the_budget_stays(
    table: tuple[Tensor, Tensor], limit: int, margin: float
) -> None:
    counts, mask = table
    swaps = choose_swaps(counts, mask, limit=limit, margin=margin)
    assert len(swaps) <= limit
    for promoted, demoted in swaps:
        gain = int(counts[promoted] - counts[demoted])
        assert not mask[promoted]
        assert mask[demoted]
        assert gain > margin * float(counts[promoted] + counts[demoted]) ** 0.5
    after = swapped(mask, swaps)
    assert after.sum() == mask.sum()
    assert (after != mask).sum() == 2 * len(swaps), "no expert moves twice in a round"


@given(tables(), st.integers(1, 7))
def test_steady_counts_lead_to_the_placement_by_frequency(
    table: tuple[Tensor, Tensor], limit: int
) -> None:
    counts, mask = table
    best = frequency(counts, int(mask.sum()))
    assert counts[settled(counts, mask, limit=limit)].sum() == counts[best].sum()


@given(tables(), st.integers(1, 7))
def test_with_a_margin_nothing_left_out_is_clearly_better(
    table: tuple[Tensor, Tensor], limit: int
) -> None:
    counts, mask = table
    mask = settled(counts, mask, limit=limit, margin=2.0)
    inside, outside = counts[mask].double(), counts[~mask].double()
    if len(inside) and len(outside):
        worst, best = inside.min(), outside.max()
        assert best - worst <= 2.0 * (best + worst).sqrt()


def test_the_best_swaps_come_first_and_cross_layers() -> None:
    counts = torch.tensor([[9, 1, 0], [2, 8, 7]])
    mask = torch.tensor([[False, True, True], [True, False, False]])
    assert choose_swaps(counts, mask, limit=2) == [
        Swap(Seat(0, 0), Seat(0, 2)),
        Swap(Seat(1, 1), Seat(0, 1)),
    ]


@pytest.mark.parametrize("every", [False, True])
def test_nothing_to_swap_where_all_live_on_one_side(every: bool) -> None:
    assert choose_swaps(torch.rand(2, 4), torch.full((2, 4), every), limit=8) == []


def test_half_of_what_was_counted_is_forgotten_in_a_half_life() -> None:
    counts = DecayedCounts(torch.tensor([[32.0, 0.0]]), top_k=1, half_life=100)
    counts.add(torch.tensor([[0, 100]]))
    assert counts.values.tolist() == [[16, 100]]
    for _ in range(20):
        counts.add(torch.tensor([[0, 10]]))
    assert float(counts.values[0, 0]) == pytest.approx(4)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_age_is_of_tokens_however_they_came(cuts: list[int]) -> None:
    whole = DecayedCounts(torch.tensor([[7.0, 0.0]]), top_k=2, half_life=64)
    cut = DecayedCounts(torch.tensor([[7.0, 0.0]]), top_k=2, half_life=64)
    whole.add(torch.tensor([[0, 2 * sum(cuts)]]))
    for num_tokens in cuts:
        cut.add(torch.tensor([[0, 2 * num_tokens]]))
    assert float(cut.values[0, 0]) == pytest.approx(float(whole.values[0, 0]))


def test_a_long_past_weighs_no_more_than_a_long_run() -> None:
    """Of counts from a file only the proportions are left where they are many."""
    past = torch.tensor([[3e9, 1e9]])
    warm = DecayedCounts(past, top_k=2, half_life=100)
    run = DecayedCounts(torch.zeros(1, 2), top_k=2, half_life=100)
    for _ in range(4000):
        run.add(torch.tensor([[1.5, 0.5]]))
    torch.testing.assert_close(warm.values, run.values, rtol=0.01, atol=0)
    few = torch.tensor([[3.0, 1.0]])
    assert torch.equal(DecayedCounts(few, top_k=2, half_life=100).values, few.double())


def replay(rule: DecayedRule, mask: Tensor, shares: Tensor, num_tokens: int) -> tuple[Tensor, int]:
    """Single tokens whose experts are drawn by `shares`: the mask at the end, and the swaps."""
    num_swaps = 0
    for _ in range(num_tokens // 64):
        drawn = shares.multinomial(64 * 2, replacement=True)
        rule.add(torch.stack([row.bincount(minlength=shares.shape[1]) for row in drawn]))
        swaps = rule.choose(mask, limit=4)
        num_swaps += len(swaps)
        mask = swapped(mask, swaps)
    return mask, num_swaps


def decayed(shape: tuple[int, int], margin: float) -> DecayedRule:
    known = DecayedCounts(torch.zeros(shape), top_k=2, half_life=4096)
    return DecayedRule(known, margin=margin, every_tokens=64)


def test_what_is_used_alike_stays_where_it_is() -> None:
    torch.manual_seed(0)
    shares = torch.full((4, 32), 1 / 32)
    mask = uniform(ExpertGrid((True,) * 4, 32), 16)
    _, restless = replay(decayed((4, 32), 0.0), mask, shares, 64 * 400)
    _, calm = replay(decayed((4, 32), 3.0), mask, shares, 64 * 400)
    assert calm * 20 < restless


def test_a_new_topic_takes_the_place_of_the_old_one() -> None:
    torch.manual_seed(0)
    first, second = torch.full((2, 16), 0.02), torch.full((2, 16), 0.02)
    first[0, :4], second[1, 8:12] = 1.0, 1.0
    rule = decayed((2, 16), 3.0)
    mask, _ = replay(rule, uniform(ExpertGrid((True, True), 16), 4), first, 8192)
    assert mask[0, :4].all()
    mask, _ = replay(rule, mask, second, 8192)
    assert mask[1, 8:12].all(), "the budget moved to another layer"


def test_looks_are_some_tokens_apart() -> None:
    rule = decayed((1, 2), 0.0)
    assert rule.choose(torch.tensor([[True, False]]), 1) == [], "nothing was seen yet"
    looks = [rule.wants(StepTokens(num_tokens, 0)) for num_tokens in (63, 1, 32, 31, 100, 1)]
    assert looks == [False, True, False, False, True, False]


def test_the_last_large_step_decides_alone() -> None:
    rule = LastChunkRule((2, 4), threshold=8)
    assert [rule.wants(StepTokens(9, n)) for n in (0, 7, 8, 9)] == [False, False, True, True]
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    rule.add(torch.tensor([[0, 5, 7, 9], [0, 0, 0, 3]]))
    rule.add(torch.tensor([[1, 0, 5, 0], [0, 0, 4, 9]]))
    first = rule.choose(mask, 1)
    assert first == [Swap(Seat(0, 2), Seat(0, 1))]
    assert rule.choose(swapped(mask, first), 1) == [Swap(Seat(1, 3), Seat(1, 0))]
    assert rule.choose(mask, 1) == [], "until the next large step"


@given(tables())
@settings(max_examples=50)
def test_the_last_large_step_takes_the_best_of_each_layer(table: tuple[Tensor, Tensor]) -> None:
    counts, mask = table
    rule = LastChunkRule((len(mask), mask.shape[1]), threshold=1)
    rule.add(counts)
    after = swapped(mask, rule.choose(mask, mask.numel()))
    for row, before, now in zip(counts, mask, after, strict=True):
        number = int(before.sum())
        assert now.sum() == number
        assert row[now].sum() == row.sort(descending=True).values[:number].sum()
