"""Which experts a call sends to the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kttrio.experts.costs import Rates, split

NEVER = 1e6  # seconds
SLACK = 1 + 1e-9  # sums of double precision
seconds = st.floats(1e-7, 1e-2)
rates_of_machines = st.builds(Rates, seconds, seconds, seconds, seconds, seconds)
RATES = Rates(40e-6, 4e-6, 60e-6, 5e-6, 0.1e-6)


@st.composite
def calls(draw):
    """Counts of choices, and who is resident."""
    num_experts = draw(st.integers(1, 12))
    counts = draw(st.lists(st.integers(0, 300), min_size=num_experts, max_size=num_experts))
    resident = draw(st.lists(st.booleans(), min_size=num_experts, max_size=num_experts))
    return torch.tensor(counts), torch.tensor(resident)


def seconds_of(counts, resident, rates, sent):
    """The same model for any set of experts, term by term."""
    host = device = copies = 0.0
    for expert, (count, is_here) in enumerate(zip(counts.tolist(), resident.tolist(), strict=True)):
        if count == 0:
            continue
        if is_here or expert in sent:
            device += rates.device_expert + count * rates.device_choice
            copies += 0 if is_here else rates.send_expert
        else:
            host += rates.host_expert + count * rates.host_choice
    return max(host, device, copies)


@given(calls(), rates_of_machines)
def test_the_prediction_is_that_of_its_choice(call, rates):
    chosen = split(*call, rates)
    assert chosen.seconds == pytest.approx(seconds_of(*call, rates, chosen.sent))


@given(calls(), rates_of_machines)
def test_only_chosen_experts_of_the_host_are_sent_and_the_most_chosen_first(call, rates):
    counts, resident = call
    sent = list(split(counts, resident, rates).sent)
    assert all(counts[expert] > 0 and not resident[expert] for expert in sent)
    left = [e for e in range(len(counts)) if e not in sent and not resident[e]]
    most_left = max((int(counts[expert]) for expert in left), default=0)
    in_order = [int(counts[expert]) for expert in sent]
    assert in_order == sorted(in_order, reverse=True)
    assert not sent or in_order[-1] >= most_left


@given(calls(), rates_of_machines)
def test_no_other_number_of_experts_would_be_faster(call, rates):
    counts, resident = call
    home = counts.masked_fill(resident, 0)
    ranked = home.sort(descending=True, stable=True).indices.tolist()
    best = split(counts, resident, rates).seconds
    for number in range(len(ranked) + 1):
        assert best <= seconds_of(counts, resident, rates, set(ranked[:number])) * SLACK


@given(calls(), rates_of_machines, st.data())
def test_one_choice_more_is_never_faster_and_no_cliff(call, rates, data):
    counts, resident = call
    expert = data.draw(st.integers(0, len(counts) - 1))
    more = counts.clone()
    more[expert] += 1
    before, after = (split(c, resident, rates).seconds for c in (counts, more))
    one = torch.ones(1)
    alone = max(float(rates.on_host(one)), float(rates.on_device(one)), rates.send_expert)
    assert before <= after * SLACK
    assert after <= before * SLACK + alone


@given(calls())
def test_where_one_side_would_take_forever_the_other_gets_all(call):
    counts, resident = call
    chosen = {e for e in range(len(counts)) if counts[e] > 0 and not resident[e]}
    assert split(counts, resident, replace(RATES, send_expert=NEVER)).sent == ()
    assert set(split(counts, resident, replace(RATES, host_expert=NEVER)).sent) == chosen


def test_longer_prompts_send_more_experts_until_all_are_sent():
    """512 experts, ten of them for each token, as evenly as can be."""
    shares = torch.linspace(2, 1, 512)
    nobody = torch.zeros(512, dtype=torch.bool)
    lengths = (64, 256, 1024, 4096, 16384)
    counts = [(10 * length * shares / shares.sum()).round().long() for length in lengths]
    found = [split(c, nobody, RATES) for c in counts]
    numbers = [len(one.sent) for one in found]
    assert numbers == sorted(numbers)
    assert 0 < numbers[0] < 512
    assert numbers[-1] > 480
    times = [one.seconds for one in found]
    assert times == sorted(times)


def test_what_the_device_has_to_do_anyway_counts():
    counts = torch.full((4,), 100)
    rates = Rates(1.0, 0.0, 0.1, 1.0, 0.0)
    assert len(split(counts, torch.tensor([False] * 4), rates).sent) == 2
    assert len(split(counts, torch.tensor([True, True, False, False]), rates).sent) == 0


def test_a_call_without_choices_sends_nothing():
    nothing = split(torch.zeros(3, dtype=torch.int64), torch.zeros(3).bool(), RATES)
    assert nothing == ((), 0.0)
