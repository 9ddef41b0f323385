from __future__ import annotations

import pytest
import torch

from kttrio.layers import attention
from kttrio.layers.attention import GatedAttention, index_keys
from kttrio.layers.cache import AttentionCache
from kttrio.layers.rotary import Rotary
from tests.batches import Run, make_batch

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, PAGE = 6, 2, 8, 20, 4


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = GatedAttention(
        HIDDEN, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, eps=1e-6, dtype=torch.float32
    )
    for parameter in layer.parameters():
        parameter.normal_(std=0.5)
    return layer


class Pages:
    """A NaN cache, and sequences with interleaved pages in it."""

    def __init__(self, lengths):
        each = -(-max(lengths) // PAGE)
        count = len(lengths)
        self.tables = [tuple(range(i, each * count, count)) for i in range(count)]
        shape = (each * count, PAGE, KV_HEADS, HEAD_DIM)
        self.cache = AttentionCache(torch.full(shape, torch.nan), torch.full(shape, torch.nan))

    def batch(self, *runs):
        """(sequence, start, length) of each run."""
        return make_batch(
            [
                Run(i, start, (0,) * length, self.tables[i][: -(-(start + length) // PAGE)])
                for i, start, length in runs
            ],
            PAGE,
        )


def run(layer, pages, hidden, *runs):
    batch = pages.batch(*runs)
    rotation = Rotary(4, theta=100.0)(batch.positions)
    return layer(hidden, rotation, index_keys(batch, PAGE), pages.cache)


def dense(layer, hidden):
    """One whole sequence with nothing but the definition."""
    rotation = Rotary(4, theta=100.0)(torch.arange(len(hidden)))
    projected = layer.in_proj(hidden).view(len(hidden), -1, HEAD_DIM)
    query, gate, key, value = projected.split((HEADS, HEADS, KV_HEADS, KV_HEADS), dim=1)
    query = rotation.apply(layer.query_norm(query))
    key = rotation.apply(layer.key_norm(key)).repeat_interleave(HEADS // KV_HEADS, 1)
    value = value.repeat_interleave(HEADS // KV_HEADS, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * HEAD_DIM**-0.5
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value) * gate.sigmoid()
    return out.flatten(1) @ layer.out_proj.weight.T


@pytest.mark.parametrize("chunks", [(23,), (1,) * 23, (4, 4, 15), (22, 1), (5, 1, 17)])
def test_any_chunking_is_causal_attention(layer, chunks):
    hidden, pages, start, outs = torch.randn(23, HIDDEN), Pages([23]), 0, []
    for chunk in chunks:
        outs.append(run(layer, pages, hidden[start : start + chunk], (0, start, chunk)))
        start += chunk
    torch.testing.assert_close(torch.cat(outs), dense(layer, hidden))


def assert_ragged(layer):
    """Decodes and prefills of very different lengths in one batch."""
    lengths = [30, 3, 1, 1, 19, 40, 7]
    starts = [29, 2, 0, 0, 5, 3, 0]
    hidden = [torch.randn(length, HIDDEN) for length in lengths]
    pages = Pages(lengths)
    for i, start in enumerate(starts):
        if start:
            run(layer, pages, hidden[i][:start], (i, 0, start))
    runs = [(i, starts[i], lengths[i] - starts[i]) for i in range(len(lengths))]
    rows = torch.cat([hidden[i][starts[i] :] for i in range(len(lengths))])
    out = run(layer, pages, rows, *runs).split([length for *_, length in runs])
    for i, part in enumerate(out):
        torch.testing.assert_close(part, dense(layer, hidden[i])[starts[i] :])


def test_ragged_sequences_do_not_meet(layer):
    assert_ragged(layer)


@pytest.mark.parametrize(
    "limits",
    [
        {"CHEAP_PADDING": 1},
        {"MAX_KEYS": 32},
        {"MAX_SCORES": 64},
        {"QUERY_BLOCK": 5},
        {"MAX_BLOCK_SCORES": 40},
        {"QUERY_BLOCK": 2, "CHEAP_PADDING": 1, "MAX_KEYS": 50},
    ],
    ids=str,
)
def test_any_grouping_gives_the_same(layer, limits, monkeypatch):
    for name, value in limits.items():
        monkeypatch.setattr(attention, name, value)
    assert_ragged(layer)


def test_decodes_of_similar_length_are_one_group():
    pages = Pages([9] * 8)
    index = index_keys(pages.batch(*((i, i, 1) for i in range(8))), PAGE)
    (group,) = index.groups
    assert index.order is None
    assert group.rows is None
    assert group.mask.shape == (8, 1, 1, 8)


def test_one_long_sequence_does_not_pad_all_others(monkeypatch):
    monkeypatch.setattr(attention, "CHEAP_PADDING", 100)
    pages = Pages([400] * 8)
    runs = [(0, 399, 1), *((i, 10, 1) for i in range(1, 8))]
    index = index_keys(pages.batch(*runs), PAGE)
    assert [group.mask.shape[3] for group in index.groups] == [400, 11]


def test_the_blocks_of_a_long_context_stay_small(monkeypatch):
    monkeypatch.setattr(attention, "MAX_SCORES", 1 << 14)
    monkeypatch.setattr(attention, "MAX_BLOCK_SCORES", 1 << 14)
    table = tuple(range(1024))
    index = index_keys(make_batch([Run(0, 4000, (0,) * 96, table)], PAGE), PAGE)
    assert [group.mask.shape[2] for group in index.groups] == [4] * 24
    assert max(group.mask.numel() for group in index.groups) <= 1 << 14


def test_masked_keys_are_never_read(layer):
    """Whatever lies behind the last token of a page, and in page 0 of the padding."""
    pages = Pages([9, 2])
    index = index_keys(pages.batch((0, 8, 1), (1, 1, 1)), PAGE)
    table, (group,) = pages.tables[1], index.groups
    keys = group.keys.view(2, 9)[1]
    assert keys.tolist() == [table[0] * PAGE, table[0] * PAGE + 1, *[table[0] * PAGE] * 7]
