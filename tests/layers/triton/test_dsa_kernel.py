from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton: pip install triton")

from kttrio.layers.paged import Latents
from kttrio.layers.triton import softmax
from kttrio.layers.triton.dsa import sparse
from tests.layers.triton.pages import assert_near, attended
from tests.layers.triton.test_mla_kernel import REAL, SCALE, SHAPES
from tests.layers.triton.where import DEVICE, needs_gpu


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(shape, counts, num_keys, dtype):
    """Queries, latents, and the rows of so many latents for each query; all others are NaN."""
    heads, size, rope = shape
    kept = torch.randn(4 * num_keys, size + rope, device=DEVICE).to(dtype)
    query = torch.randn(len(counts), heads, size + rope, device=DEVICE).to(dtype)
    rows = torch.stack([torch.randperm(len(kept))[:num_keys] for _ in counts]).to(DEVICE)
    for row, count in zip(rows, counts, strict=True):
        row[torch.randperm(num_keys, device=DEVICE)[count:]] = -1
    other = torch.ones(len(kept), dtype=torch.bool, device=DEVICE)
    other[rows[rows >= 0]] = False
    kept[other] = torch.nan
    return query, Latents(kept, size, SCALE), rows


def expected(query, latents, rows):
    outs = []
    for mine, row in zip(query, rows, strict=True):
        keys = latents.rows[row[row >= 0]].unsqueeze(1)
        outs.append(attended(mine, keys, keys[..., : latents.size], latents.scale))
    return torch.stack(outs)


def check(shape, counts, num_keys, dtype):
    query, latents, rows = make(shape, counts, num_keys, dtype)
    found = sparse(query, latents, rows)
    assert found.dtype is dtype
    assert_near(found, expected(query, latents, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_only_the_chosen_latents_are_read(shape, dtype):
    check(shape, [7, 1, 4], 7, dtype)


@pytest.mark.parametrize("keys", [1, 64])
def test_keys_may_be_split_anyhow(keys, monkeypatch):
    """Whole blocks, and whole splits, may hold none."""
    monkeypatch.setattr(softmax, "KEYS_PER_SPLIT", keys)
    check(SHAPES[0], [1, 200, 2], 200, torch.float32)


@pytest.mark.parametrize("shape", [pytest.param(s, id=str(s), marks=needs_gpu) for s in REAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_real_models(shape, dtype):
    check(shape, [2048, 1, 700], 2048, dtype)
    check(shape, [2048] * 300, 2048, dtype)
