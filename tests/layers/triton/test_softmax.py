from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton: pip install triton")

from kttrio.layers.triton import softmax
from kttrio.layers.triton.softmax import Partials, num_splits

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def many_processors(monkeypatch):
    monkeypatch.setattr(softmax, "_INTERPRETED", 100)


@pytest.mark.parametrize(
    ("num_keys", "num_programs", "splits"),
    [
        (1, 1, 1),
        (256, 1, 1),
        (1000, 1, 4),
        (100_000, 1, 128),  # two waves of 100 would be 200
        (100_000, 8, 16),
        (100_000, 200, 1),
        (100_000, 5000, 1),
    ],
)
def test_idle_processors_share_keys_that_suffice(num_keys, num_programs, splits):
    assert num_splits(num_keys, num_programs, CPU) == splits


def test_few_kernels_serve_all_batches():
    found = {num_splits(keys, n, CPU) for keys in (1, 5000, 99_999) for n in range(1, 300)}
    assert found == {1, 2, 4, 8, 16, 32, 64, 128}


def test_nothing_is_left_behind_where_nothing_is_split():
    out = torch.empty(3, 5, 7, dtype=torch.bfloat16)
    assert all(part.numel() == 0 for part in Partials.like(out, 1))
    sums, scales = Partials.like(out, 4)
    assert sums.shape == (3, 5, 4, 7)
    assert scales.shape == (3, 5, 4, 2)
    assert sums.dtype is scales.dtype is torch.float32
