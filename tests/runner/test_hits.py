from __future__ import annotations

import torch

from kttrio.runner.hits import Hits


def test_the_share_is_of_all_choices_of_all_layers():
    served = [torch.tensor([77]), torch.tensor([8])]
    hits = Hits(served, choices=2 * 3)
    assert hits.report() == {}
    for count in served:
        count += 15  # what is counted on the device
    hits.num_tokens += 10
    assert hits.report() == {"served_by_device_experts": 0.5}
