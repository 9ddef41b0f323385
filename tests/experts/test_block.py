from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kttrio.experts.block import MoEBlock
from kttrio.experts.routing import SigmoidRouter, SoftmaxRouter


class Recorder:
    """Experts that remember what they were asked and answer with ones."""

    def forward(self, x, routing, beside=None, carry=None):
        self.x, self.routing = x, routing
        return torch.ones_like(x) if beside is None else 1 + beside()

    def stream(self, x, routing, out, carry=None):
        for row in range(len(x)):
            out[row] += self.forward(x[row], routing)
            yield


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = MoEBlock(
        16,
        router=SoftmaxRouter(6, 2, renormalise=True),
        shared="gated",
        shared_size=8,
        experts=Recorder(),
        dtype=torch.float32,
    )
    for parameter in block.parameters():
        parameter.normal_()
    return block


def test_the_shared_expert_is_gated_and_added(block):
    x = torch.randn(5, 16)
    out = block(x)
    gate, up = F.linear(x, block.shared.gate_up.weight).split(8, dim=1)
    shared = F.linear(F.silu(gate) * up, block.shared.down.weight)
    gated = shared * torch.sigmoid(x @ block.gates[6])[:, None]
    torch.testing.assert_close(out, 1 + gated)


def test_experts_get_the_routing_of_the_router_rows(block):
    x = torch.randn(5, 16)
    block(x)
    expected = F.linear(x, block.gates[:6]).topk(2).indices
    assert torch.equal(block.experts.x, x)
    assert torch.equal(block.experts.routing.ids.long(), expected)


def test_the_router_works_in_float32_whatever_the_model_is():
    """Two experts whose logits differ by less than bfloat16 can tell."""
    block = MoEBlock(
        2,
        router=SoftmaxRouter(2, 1, renormalise=True),
        shared="gated",
        shared_size=2,
        experts=Recorder(),
        dtype=torch.bfloat16,
    )
    for parameter in block.parameters():
        parameter.zero_()
    block.gates[0, 0], block.gates[1, 0] = 100.0, 100.01
    out = block(torch.ones(1, 2, dtype=torch.bfloat16))
    assert out.dtype is torch.bfloat16
    assert block.experts.routing.ids.tolist() == [[1]]


@pytest.mark.parametrize("shared", ["plain", "none"])
def test_a_block_without_gate_has_router_rows_and_bias_only(shared):
    torch.manual_seed(0)
    block = MoEBlock(
        16,
        router=SigmoidRouter(6, 2, renormalise=True),
        shared=shared,
        shared_size=8,
        experts=Recorder(),
        dtype=torch.float32,
    )
    for parameter in block.parameters():
        parameter.normal_()
    x = torch.randn(5, 16)
    assert block.gates.shape == (6, 16)
    expected = torch.ones(5, 16) if shared == "none" else 1 + block.shared(x)
    torch.testing.assert_close(block(x), expected)
    biased = (x @ block.gates.T).sigmoid() + block.bias
    assert torch.equal(block.experts.routing.ids.long(), biased.topk(2).indices)


def test_a_long_prompt_gets_what_its_pieces_get(block):
    x, out = torch.randn(7, 16), torch.full((7, 16), torch.nan)
    between = list(block.stream(x, out, piece=3))
    torch.testing.assert_close(out, block(x))
    assert len(between) == 3 + 7, "a yield for each piece, and for each of the experts'"
