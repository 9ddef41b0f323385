"""Paged caches for the tests of kernels: pages scattered, everything that is nobody's NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.layers.triton.where import DEVICE

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Sums in another order; and weights that are rounded before they meet the values."""


def scattered(num_keys: list[int], page_size: int) -> Tensor:
    """A page table [sequences, pages] for so many keys, with room behind the longest; page 0,
    which pads it, is nobody's."""
    counts = [-(-count // page_size) for count in num_keys]
    order = 1 + torch.randperm(sum(counts))
    table = torch.zeros(len(counts), max(counts) + 2, dtype=torch.int64)
    for row, pages in zip(table, order.split(counts), strict=True):
        row[: len(pages)] = pages
    return table.to(DEVICE)


def filled(table: Tensor, num_keys: list[int], page_size: int, *shape: int) -> Tensor:
    """Float32 pages [pages, page_size, *shape] that hold something for these keys alone."""
    cache = torch.full((int(table.max()) + 1, page_size, *shape), torch.nan, device=DEVICE)
    for row, count in zip(rows_of(table, page_size), num_keys, strict=True):
        cache.flatten(0, 1)[row[:count]] = torch.randn(count, *shape, device=DEVICE)
    return cache


def rows_of(table: Tensor, page_size: int) -> Tensor:
    """[sequences, keys] rows of the cache"""
    offsets = torch.arange(page_size, device=table.device)
    return (table.unsqueeze(2) * page_size + offsets).flatten(1)


def attended(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The definition, in float32, for one query: [heads, k], [keys, heads or 1, k],
    [keys, heads or 1, v] -> [heads, v]"""
    query, keys, values = query.float(), keys.float(), values.float()
    weights = (torch.einsum("hk,shk->hs", query, keys.expand(-1, len(query), -1)) * scale).softmax(
        1
    )
    return torch.einsum("hs,shv->hv", weights, values.expand(-1, len(query), -1))


def assert_near(found: Tensor, expected: Tensor) -> None:
    """`expected` in float32."""
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
