"""What experts cost, measured."""

from __future__ import annotations

import logging
import time
from dataclasses import astuple

import pytest
import torch

from kttrio.experts.rates import measure
from tests.experts.rings import ALL, machine
from tests.native.expert_reference import KINDS


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_rate_is_found_quickly(kind, caplog):
    with machine(kind) as made, caplog.at_level(logging.INFO):
        begin = time.monotonic()
        rates = measure(made.ring, made.layers[0], ALL, dtype=torch.float32)
        assert time.monotonic() - begin < 2
        assert all(0 <= seconds < 0.1 for seconds in astuple(rates))
        assert rates.send_expert > 0
        assert rates.host_expert + rates.host_choice > 0
        assert rates.device_expert + rates.device_choice > 0
    assert "GB/s" in caplog.text


@pytest.mark.parametrize("experts", [[3], [4, 0, 12]], ids=str)
def test_the_ring_is_as_before(experts):
    with machine() as made:
        measure(made.ring, made.layers[0], experts, dtype=torch.bfloat16)
        assert (made.ring.num_sent, made.ring.num_wasted, made.ring.is_busy) == (0, 0, False)
        made.stream()
        assert made.ring.num_sent == len(ALL)
