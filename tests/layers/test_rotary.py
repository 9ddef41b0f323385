from __future__ import annotations

import math

import pytest
import torch

from kttrio.layers.rotary import Rotary, read_rope
from kttrio.weights.checkpoint import CheckpointError
from kttrio.weights.fields import Fields


def test_pairs_turn_by_their_angle_and_the_rest_passes():
    x = torch.randn(2, 3, 10)
    out = Rotary(4, theta=100.0)(torch.tensor([0, 7])).apply(x)
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[1, :, 4:], x[1, :, 4:])
    for i, angle in enumerate((7.0, 0.7)):  # theta ** (-2 i / 4)
        first, second = x[1, :, i], x[1, :, i + 2]
        cos, sin = math.cos(angle), math.sin(angle)
        torch.testing.assert_close(out[1, :, i], first * cos - second * sin)
        torch.testing.assert_close(out[1, :, i + 2], second * cos + first * sin)


def test_scores_depend_on_the_distance_alone():
    rotary = Rotary(8, theta=1e4)
    query, key = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(position, other):
        turned = rotary(torch.tensor([position])).apply(query)
        return (turned * rotary(torch.tensor([other])).apply(key)).sum()

    torch.testing.assert_close(score(9, 4), score(1009, 1004), rtol=0, atol=1e-3)


def test_the_dtype_stays():
    x = torch.randn(2, 1, 8).bfloat16()
    assert Rotary(4, theta=10.0)(torch.tensor([1, 2])).apply(x).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_theta": 5e6, "partial_rotary_factor": 0.25},
        {"rope_theta": 5e6, "partial_rotary_factor": 0.25, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.25}},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
            "partial_rotary_factor": 0.25,
        },
    ],
)
def test_every_spelling_is_read(raw):
    assert read_rope(Fields(raw)) == (5e6, 0.25)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "rope_theta is missing"),
        ({"rope_theta": 1e4}, "partial_rotary_factor is missing"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: rope type 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: rope type 'linear'"),
    ],
)
def test_nothing_is_guessed(raw, message):
    with pytest.raises(CheckpointError, match=message):
        read_rope(Fields(raw))
