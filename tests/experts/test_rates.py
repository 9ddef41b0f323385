"""What experts cost, measured."""

from __future__ import annotations

import time
from dataclasses import astuple

import pytest
import torch

from kttrio.experts.costs import Rates
from kttrio.experts.rates import describe, measure
from tests.experts.rings import ALL, machine
from tests.native.expert_reference import KINDS


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_rate_is_found_quickly(kind):
    with machine(kind) as made:
        begin = time.monotonic()
        rates = measure(made.ring, made.layers[0], ALL, dtype=torch.float32)
        assert time.monotonic() - begin < 2
        assert all(0 <= seconds < 0.1 for seconds in astuple(rates))
        assert rates.send_expert > 0
        assert rates.host_expert + rates.host_choice > 0
        assert rates.device_expert + rates.device_choice > 0


@pytest.mark.parametrize("experts", [[3], [4, 0, 12]], ids=str)
def test_the_ring_is_as_before(experts):
    with machine() as made:
        measure(made.ring, made.layers[0], experts, dtype=torch.bfloat16)
        assert (made.ring.num_sent, made.ring.num_wasted, made.ring.is_busy) == (0, 0, False)
        made.stream()
        assert made.ring.num_sent == len(ALL)


@pytest.mark.parametrize(("nbytes", "size"), [(12_288, "12.3 kB"), (3_147_264, "3.1 MB")])
def test_rates_in_words(nbytes, size):
    rates = Rates(20e-6, 0.5e-6, 1e-6 * nbytes / 1e3, 7e-6, 0.1e-6)
    assert describe(rates, nbytes).startswith(f"an expert of {size} takes ")
    assert describe(rates, nbytes).endswith("us to get there (1.0 GB/s)")
