"""Which experts each token goes to, and how much of each it takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """One row per token; an id of -1 is skipped by whoever computes the experts."""

    ids: Tensor  # [tokens, top_k] int32
    weights: Tensor  # [tokens, top_k] float32


def softmax_top_k(logits: Tensor, top_k: int, *, renormalise: bool) -> Routing:
    """The most probable experts of each token; renormalised, their weights add up to one.

    logits [tokens, experts] float32: rounding them first would flip near ties.
    """
    best, ids = logits.topk(top_k, dim=-1)
    if renormalise:  # the softmax over all, divided by its sum over the chosen
        return Routing(ids.to(torch.int32), best.softmax(-1))
    return Routing(ids.to(torch.int32), (best - logits.logsumexp(-1, keepdim=True)).exp())
