from __future__ import annotations

import torch

from kttrio.experts.routing import softmax_top_k


def test_renormalised_weights_are_the_softmax_over_the_chosen():
    logits = torch.randn(50, 12) * 3
    routing = softmax_top_k(logits, 4, renormalise=True)
    assert routing.ids.dtype is torch.int32
    assert routing.weights.dtype is torch.float32
    probabilities, ids = logits.softmax(-1).topk(4)
    assert torch.equal(routing.ids.long(), ids)
    expected = probabilities / probabilities.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights, expected)


def test_weights_without_renormalising_are_the_probabilities():
    logits = torch.randn(50, 12) * 3
    routing = softmax_top_k(logits, 4, renormalise=False)
    torch.testing.assert_close(routing.weights, logits.softmax(-1).topk(4).values)


def test_huge_logits_stay_finite():
    routing = softmax_top_k(torch.tensor([[1e30, -1e30, 3.0]]), 2, renormalise=True)
    assert routing.weights.tolist() == [[1.0, 0.0]]
