from __future__ import annotations

import torch

from kttrio.plan import Chunk, StepPlan
from kttrio.request import SamplingParams
from kttrio.runner.hits import Hits


def chunk(num_tokens):
    return Chunk(0, 0, (5,) * num_tokens, (0,), SamplingParams(1, seed=0), True, num_tokens)


def test_the_share_is_of_all_choices_of_all_layers():
    served = [torch.tensor([77]), torch.tensor([8])]
    hits = Hits(served, choices=2 * 3)
    assert hits.report() == {}
    for count in served:
        count += 15  # what is counted on the device
    hits.count(StepPlan((chunk(4), chunk(6))))
    assert hits.report() == {"served_by_device_experts": 0.5}


def test_a_long_prompt_counts_once_and_those_beside_it_in_each_step():
    served = torch.tensor([0])
    hits = Hits([served], choices=1)
    served += 100
    one, other = chunk(50), chunk(50)
    for long in (one, one, one, other, None):
        hits.count(StepPlan((chunk(20),), long))
    assert hits.report() == {"served_by_device_experts": 100 / (5 * 20 + 2 * 50)}
