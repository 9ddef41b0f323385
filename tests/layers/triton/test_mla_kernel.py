from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton: pip install triton")

from kttrio.layers.paged import Latents, Tables
from kttrio.layers.triton import softmax
from kttrio.layers.triton.mla import latent
from tests.layers.triton.pages import assert_near, attended, filled, rows_of, scattered
from tests.layers.triton.where import DEVICE, needs_gpu

SHAPES = [(5, 12, 4), (17, 40, 8), (2, 64, 64)]  # heads, latent, rope
REAL = [(128, 512, 64), (64, 512, 64), (16, 512, 64)]
SCALE = 0.31


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(shape, positions, page_size, dtype):
    """Queries, latents and tables, all that is nobody's NaN."""
    heads, size, rope = shape
    num_keys = [position + 1 for position in positions]
    table = scattered(num_keys, page_size)
    kept = filled(table, num_keys, page_size, size + rope).to(dtype)
    query = torch.randn(len(positions), heads, size + rope, device=DEVICE).to(dtype)
    tables = Tables(table, torch.tensor(positions, device=DEVICE), page_size)
    return query, Latents(kept.flatten(0, 1), size, SCALE), tables


def expected(query, latents, tables):
    outs = []
    every = zip(query, rows_of(tables.pages, tables.page_size), tables.positions, strict=True)
    for mine, rows, position in every:
        keys = latents.rows[rows[: position + 1]].unsqueeze(1)
        outs.append(attended(mine, keys, keys[..., : latents.size], latents.scale))
    return torch.stack(outs)


def check(shape, positions, page_size, dtype):
    query, latents, tables = make(shape, positions, page_size, dtype)
    found = latent(query, latents, tables)
    assert found.dtype is dtype
    assert_near(found, expected(query, latents, tables))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_query_sees_its_own_latents(shape, dtype):
    check(shape, [18, 0, 8, 3], 4, dtype)


@pytest.mark.parametrize("keys", [1, 64])
@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_keys_may_be_split_anyhow(page_size, keys, monkeypatch):
    monkeypatch.setattr(softmax, "KEYS_PER_SPLIT", keys)
    check(SHAPES[0], [150, 0], page_size, torch.float32)


def test_nan_in_one_sequence_spoils_no_other():
    query, latents, tables = make(SHAPES[0], [9, 70, 9], 4, torch.float32)
    right = expected(query, latents, tables)
    latents.rows[rows_of(tables.pages, 4)[1, 40]] = torch.nan
    found = latent(query, latents, tables)
    assert_near(found[[0, 2]], right[[0, 2]])
    assert found[1].isnan().all()


@pytest.mark.parametrize("shape", [pytest.param(s, id=str(s), marks=needs_gpu) for s in REAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_real_models(shape, dtype):
    check(shape, [4000, 31, 1023, 64, 0, 9999], 64, dtype)
    check(shape, [257] * 300, 64, dtype)
