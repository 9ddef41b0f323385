from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from kttrio.layers.grouped import Stacks, grouped_mlp
from kttrio.weights.formats.base import Packed
from tests.layers.experts import KINDS, Experts, routing

HIDDEN, WIDTH, SLOTS, TOP_K = 160, 96, 5, 3  # neither is a whole number of fp8's blocks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_token_gets_what_its_experts_give(kind, dtype, fixed):
    experts = Experts.random(kind, (SLOTS, HIDDEN, WIDTH))
    x = torch.randn(7, HIDDEN).to(dtype)
    ids, weights = routing(7, SLOTS, TOP_K)
    out = torch.ones(7, HIDDEN)
    grouped_mlp(x, ids, weights, experts.stacks, form=experts.form, out=out, fixed=fixed)
    # An activation in bfloat16 may round to its neighbour where the sums differ in their order.
    tolerance = 1e-5 if dtype is torch.float32 else 4e-3
    expected = 1 + experts.expected(x, ids, weights)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fixed", [False, True])
def test_slots_that_nobody_chose_may_hold_anything(fixed):
    experts = Experts.random(("bf16", 0), (SLOTS, HIDDEN, WIDTH))
    for part in experts.stacks:
        part.data[0], part.data[3] = torch.nan, torch.inf
    ids = torch.tensor([[1, -1], [-1, -1], [4, 2]], dtype=torch.int32)
    x, weights, out = torch.randn(3, HIDDEN), torch.rand(3, 2), torch.zeros(3, HIDDEN)
    grouped_mlp(x, ids, weights, experts.stacks, form="bf16", out=out, fixed=fixed)
    assert out[1].eq(0).all()
    torch.testing.assert_close(out, experts.expected(x, ids, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("tokens", "slots"), [(0, SLOTS), (3, 0)])
def test_nothing_to_do_is_done(tokens, slots, fixed):
    stacks = Stacks(*(Packed(torch.empty(slots, 64, 64).bfloat16()) for _ in range(3)))
    ids = torch.full((tokens, 2), -1, dtype=torch.int32)
    out = torch.ones(tokens, 64)
    x, weights = torch.randn(tokens, 64), torch.rand(tokens, 2)
    grouped_mlp(x, ids, weights, stacks, form="bf16", out=out, fixed=fixed)
    assert out.eq(1).all()


def traced(fixed, ids, weights):
    """`grouped_mlp` as a graph of operations, recorded with these ids."""
    experts = Experts.random(("fp8", 128), (SLOTS, HIDDEN, WIDTH))
    x = torch.randn(*ids.shape[:1], HIDDEN)

    def work(ids, weights):
        out = torch.zeros(x.shape)
        grouped_mlp(x, ids, weights, experts.stacks, form="fp8", out=out, fixed=fixed)
        return out

    return make_fx(work)(ids, weights), experts, x


def test_in_its_fixed_form_nothing_depends_on_the_ids():
    graph, experts, x = traced(True, *routing(4, SLOTS, TOP_K))
    ids, weights = routing(4, SLOTS, TOP_K)
    expected = experts.expected(x, ids, weights)
    torch.testing.assert_close(graph(ids, weights), expected, rtol=1e-5, atol=1e-5)


def test_the_other_form_asks_the_ids():
    with pytest.raises(RuntimeError):
        traced(False, *routing(4, SLOTS, TOP_K))
