from __future__ import annotations

import pytest
import torch

from kttrio.layers.batch import decode_batch
from kttrio.layers.keys import index_keys
from kttrio.layers.runs import index_runs
from kttrio.layers.spans import index_spans
from tests.batches import Tables

POSITIONS = [8, 1, 0]


@pytest.fixture
def tables():
    return Tables([9, 9, 9])


@pytest.fixture
def static(tables):
    return decode_batch(
        torch.tensor([5, 6, 7]),
        torch.tensor(POSITIONS),
        torch.tensor([2, 0, 1]),
        torch.tensor(tables.tables),
        page_size=tables.page_size,
    )


@pytest.fixture
def plain(tables):
    return tables.batch(*((i, position, 1) for i, position in enumerate(POSITIONS)))


def test_a_static_batch_is_known_by_its_shapes(static, plain):
    assert static.is_static
    assert not plain.is_static
    assert static.lengths == plain.lengths
    assert static.offsets == plain.offsets
    assert static.num_decodes == static.num_tokens == 3
    assert torch.equal(static.kv_index, plain.kv_index)


def test_its_queries_find_the_same_keys(static, plain):
    """As many more as the tables are wide stand behind them, and are not seen."""
    index = index_keys(static)
    (group,), (expected,) = index.groups, index_keys(plain).groups
    real = expected.keys.shape[1]
    assert torch.equal(group.keys[:, :real], expected.keys)
    assert torch.equal(group.mask[..., :real], expected.mask)
    assert not group.mask[..., real:].any()
    assert (group.keys[:, real:] == group.keys[:, :1]).all()
    assert index.order is None


def test_its_span_reaches_as_far_as_the_tables(static, plain):
    (group,), (expected,) = index_spans(static).groups, index_spans(plain).groups
    whole = slice(0, 1)
    assert group.reach(whole) == group.num_keys == 12
    assert torch.equal(group.visible(whole)[..., :9], expected.visible(whole))
    assert torch.equal(group.visible(whole).sum(-1), torch.tensor([[9], [2], [1]]))


def test_its_first_tokens_begin_their_slots(static, plain):
    lanes, expected = index_runs(static).decodes, index_runs(plain).decodes
    assert torch.equal(lanes.fresh, expected.fresh)
    assert lanes.slots.tolist() == [2, 0, 1]
