from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton: pip install triton")

from kttrio.layers.cache import AttentionCache
from kttrio.layers.paged import Tables
from kttrio.layers.triton import attention_decode, softmax
from kttrio.layers.triton.attention_decode import decode
from tests.layers.triton.pages import assert_near, attended, filled, rows_of, scattered
from tests.layers.triton.where import DEVICE, needs_gpu


class Heads(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = [Heads(6, 2, 24), Heads(2, 2, 64), Heads(20, 1, 8)]
REAL = [Heads(32, 4, 128), Heads(16, 2, 256), Heads(96, 8, 128), Heads(48, 8, 128)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(shape, positions, page_size, dtype):
    """Queries, cache and tables, all that is nobody's NaN."""
    num_keys = [position + 1 for position in positions]
    table = scattered(num_keys, page_size)
    cache = AttentionCache(
        *(
            filled(table, num_keys, page_size, shape.kv_heads, shape.head_dim).to(dtype)
            for _ in range(2)
        )
    )
    query = torch.randn(len(positions), shape.heads, shape.head_dim, device=DEVICE).to(dtype)
    return query, cache, Tables(table, torch.tensor(positions, device=DEVICE), page_size)


def expected(query, cache, tables):
    shared = query.shape[1] // cache.key.shape[2]
    outs = []
    every = zip(query, rows_of(tables.pages, tables.page_size), tables.positions, strict=True)
    for mine, rows, position in every:
        key, value = (
            x.flatten(0, 1)[rows[: position + 1]].repeat_interleave(shared, 1)
            for x in (cache.key, cache.value)
        )
        outs.append(attended(mine, key, value, query.shape[2] ** -0.5))
    return torch.stack(outs)


def check(shape, positions, page_size, dtype):
    query, cache, tables = make(shape, positions, page_size, dtype)
    found = decode(query, cache, tables)
    assert found.dtype is dtype
    assert_near(found, expected(query, cache, tables))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_query_sees_its_own_keys(shape, dtype):
    check(shape, [18, 0, 8, 3], 4, dtype)


@pytest.mark.parametrize("keys", [1, 64])
@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_keys_may_be_split_anyhow(page_size, keys, monkeypatch):
    """Some splits have no keys at all."""
    monkeypatch.setattr(softmax, "KEYS_PER_SPLIT", keys)
    check(SHAPES[0], [150, 0], page_size, torch.float32)


@pytest.mark.parametrize("splits", [2, 16, 37])
def test_parts_of_any_number_are_joined(splits, monkeypatch):
    monkeypatch.setattr(attention_decode, "num_splits", lambda *_: splits)
    check(SHAPES[0], [150, 0], 4, torch.float32)
    check(SHAPES[0], [40], 4, torch.bfloat16)


def test_nan_in_one_sequence_spoils_no_other():
    query, cache, tables = make(SHAPES[0], [9, 70, 9], 4, torch.float32)
    right = expected(query, cache, tables)
    cache.key[tables.pages[1, 9]] = torch.nan
    found = decode(query, cache, tables)
    assert_near(found[[0, 2]], right[[0, 2]])
    assert found[1].isnan().all()


@pytest.mark.parametrize("shape", [pytest.param(s, id=str(s), marks=needs_gpu) for s in REAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_real_models(shape, dtype):
    check(shape, [4000, 31, 1023, 64, 0, 9999], 64, dtype)
    check(shape, [257] * 300, 64, dtype)
