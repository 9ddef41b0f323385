from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton: pip install triton")

from kttrio.layers.cache import AttentionCache
from kttrio.layers.paged import Chunks, Tables
from kttrio.layers.triton.attention_prefill import prefill
from tests.layers.triton.pages import assert_near, filled, scattered
from tests.layers.triton.test_attention_decode import REAL, SHAPES, expected
from tests.layers.triton.where import DEVICE, needs_gpu


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(shape, runs, page_size, dtype):
    """Queries, cache and chunks for (start, length) of each sequence."""
    num_keys = [start + length for start, length in runs]
    table = scattered(num_keys, page_size)
    pages = (shape.kv_heads, shape.head_dim)
    key, value = (filled(table, num_keys, page_size, *pages).to(dtype) for _ in range(2))
    lengths = torch.tensor([0, *(length for _, length in runs)], device=DEVICE)
    starts = torch.tensor([start for start, _ in runs], device=DEVICE)
    chunks = Chunks(table, starts, lengths.cumsum(0), int(lengths.max()), page_size)
    query = torch.randn(int(lengths.sum()), shape.heads, shape.head_dim, device=DEVICE)
    return query.to(dtype), AttentionCache(key, value), chunks


def one_by_one(chunks):
    """Each query as a sequence of its own."""
    lengths = chunks.offsets.diff()
    positions = [
        int(start) + i for start, n in zip(chunks.starts, lengths, strict=True) for i in range(n)
    ]
    pages = chunks.pages.repeat_interleave(lengths, 0)
    return Tables(pages, torch.tensor(positions, device=DEVICE), chunks.page_size)


def check(shape, runs, page_size, dtype):
    query, cache, chunks = make(shape, runs, page_size, dtype)
    found = prefill(query, cache, chunks)
    assert found.dtype is dtype
    assert_near(found, expected(query, cache, one_by_one(chunks)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_of_any_length_are_causal(shape, dtype):
    check(shape, [(0, 23), (17, 2), (3, 1), (70, 9)], 4, dtype)


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_pages_may_have_any_size(page_size):
    check(SHAPES[0], [(60, 40), (0, 1)], page_size, torch.float32)


def test_nan_in_one_sequence_spoils_no_other():
    query, cache, chunks = make(SHAPES[0], [(4, 5), (2, 70), (0, 9)], 4, torch.float32)
    right = expected(query, cache, one_by_one(chunks))
    cache.value[chunks.pages[1, 0]] = torch.nan
    found = prefill(query, cache, chunks)
    assert_near(found[:5], right[:5])
    assert found[5:75].isnan().all()
    assert_near(found[75:], right[75:])


@pytest.mark.parametrize("shape", [pytest.param(s, id=str(s), marks=needs_gpu) for s in REAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_real_models(shape, dtype):
    check(shape, [(0, 1000), (3000, 3), (511, 257), (64, 64)], 64, dtype)
