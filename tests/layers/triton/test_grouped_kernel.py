from __future__ import annotations

from itertools import chain

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton: pip install triton")

from kttrio.layers.grouped import Stacks
from kttrio.layers.triton import grouped, scratch
from kttrio.weights.formats.base import Packed
from tests.layers.experts import KINDS, Experts, routing
from tests.layers.triton.where import DEVICE, needs_gpu

SLOTS, HIDDEN, WIDTH = 5, 160, 96  # neither is a whole number of fp8's blocks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_device(stacks):
    return Stacks(*(Packed(*(_moved(part) for part in packed)) for packed in stacks))


def _moved(part):
    return None if part is None else part.to(DEVICE)


def check(experts, x, ids, weights):
    """The kernels against the definition; they add to what is there."""
    out = torch.ones(x.shape, device=DEVICE)
    moved = (tensor.to(DEVICE) for tensor in (x, ids, weights))
    grouped.grouped_mlp(*moved, on_device(experts.stacks), form=experts.form, out=out)
    # The interpreter cuts off what does not fit into bfloat16, where chips round.
    tolerance = 1e-5 if x.dtype is torch.float32 else 1e-2
    expected = 1 + experts.expected(x, ids, weights)
    torch.testing.assert_close(out.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_few_tokens_are_not_sorted(kind, dtype):
    experts = Experts.random(kind, (SLOTS, HIDDEN, WIDTH))
    check(experts, torch.randn(3, HIDDEN).to(dtype), *routing(3, SLOTS, 3))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_many_tokens_are(kind):
    """80 choices of 5 slots; one slot is nobody's, and another's rows do not fill a block."""
    experts = Experts.random(kind, (SLOTS, HIDDEN, WIDTH))
    ids, weights = routing(40, SLOTS, 2)
    ids[ids == 3] = -1
    ids[3:][ids[3:] == 2] = -1
    for packed in experts.stacks:
        if packed.data.is_floating_point():
            packed.data[3] = torch.nan
    check(experts, torch.randn(40, HIDDEN), ids, weights)


@pytest.mark.parametrize("tokens", [2, 40])
def test_tokens_without_any_slot_here_keep_what_they_have(tokens):
    experts = Experts.random(("bf16", 0), (SLOTS, HIDDEN, WIDTH))
    ids = torch.full((tokens, 2), -1, dtype=torch.int32)
    check(experts, torch.randn(tokens, HIDDEN), ids, torch.rand(tokens, 2))


def test_what_does_not_fit_at_once_comes_in_pieces(monkeypatch):
    """One token and the fewest columns at a time."""
    monkeypatch.setattr(scratch, "_BYTES", 0)
    experts = Experts.random(("fp8", 128), (SLOTS, 300, WIDTH))
    check(experts, torch.randn(3, 300), *routing(3, SLOTS, 3))


class TestBlocks:
    def blocks(self, ids, rows=2, num_slots=4):
        ids = torch.tensor(ids, dtype=torch.int32, device=DEVICE)
        return grouped.sort_by_slot(ids, num_slots=num_slots, rows=rows)

    def used(self, blocks):
        table = torch.stack(blocks[:3], dim=1).tolist()
        return [
            (slot, blocks.order[first:last].tolist()) for slot, first, last in table if first < last
        ]

    def test_each_is_of_one_slot(self):
        blocks = self.blocks([[3, 0], [0, -1], [0, 3]])
        assert [(s, sorted(c)) for s, c in self.used(blocks) if s == 3] == [(3, [0, 5])]
        assert sorted(chain(*(c for s, c in self.used(blocks) if s == 0))) == [1, 2, 4]
        assert [len(c) for s, c in self.used(blocks)] == [2, 1, 2]

    def test_there_are_enough_in_the_worst_case(self):
        blocks = self.blocks([[0, 1, 2, 3]])
        assert self.used(blocks) == [(0, [0]), (1, [1]), (2, [2]), (3, [3])]
        blocks = self.blocks([[0, 1, 2, 2, 2, 2, 3]])
        assert [s for s, _ in self.used(blocks)] == [0, 1, 2, 2, 3]

    def test_what_is_skipped_is_in_none(self):
        assert self.used(self.blocks([[-1, -1], [-1, -1]])) == []


class TestPublishedSizes:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("tokens", [1, 16, 700, 5000])
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_they_agree_with_torch(self, kind, tokens):
        experts = Experts.random(kind, (24, 2048, 768))
        check(experts, torch.randn(tokens, 2048).bfloat16(), *routing(tokens, 24, 8))
