"""The gated delta rule, in torch, in two forms: token by token, and in chunks, as matrix products.

Yang et al., "Gated Delta Networks" (2024). What it does to a state is written here once; kernels
are tested against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kttrio.layers.gather import Gather
from kttrio.layers.runs import CHUNK, Lanes


class Heads(NamedTuple):
    """Tokens as the recurrence takes them, float32."""

    query: Tensor  # [n, length, heads, key_dim]
    key: Tensor  # [n, length, heads, key_dim]
    value: Tensor  # [n, length, heads, value_dim]
    decay: Tensor  # [n, length, heads], its logarithm
    beta: Tensor  # [n, length, heads]


class DeltaRule:
    """The recurrence on states as caches hold them."""

    def __init__(self, gather: Gather) -> None:
        self._gather = gather

    def decode(self, heads: Heads, states: Tensor, lanes: Lanes) -> Tensor:
        state = _begun(self._gather.rows("states", states, lanes.slots), lanes)
        outs: list[Tensor] = []
        for out in delta_tokens(*heads, state):
            if not outs:
                states.index_copy_(0, lanes.slots, state)
            outs.append(out)
        return outs[0].unsqueeze(1) if len(outs) == 1 else torch.stack(outs, dim=1)

    def chunks(self, heads: Heads, state: Tensor) -> tuple[Tensor, Tensor]:
        return delta_chunks(*heads, state)


def remembered(cache: Tensor, lanes: Lanes) -> Tensor:
    """A copy of the lanes' slots, zero where a sequence begins."""
    return _begun(cache.index_select(0, lanes.slots), lanes)


def _begun(held: Tensor, lanes: Lanes) -> Tensor:
    """Zero, in place, where a sequence begins."""
    if lanes.fresh is not None:
        held.masked_fill_(lanes.fresh.view(-1, *(1,) * (held.dim() - 1)), 0)
    return held


def delta_step(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """One token of the recurrence; updates `state` [n, heads, key_dim, value_dim] in place.

    query, key [n, heads, key_dim], value [n, heads, value_dim], log `decay` and beta [n, heads];
    all float32. State decays first; the delta is taken from what is left:
    S = exp(decay) S;  u = beta (v - S^T k);  S = S + k u^T;  out = S^T q.
    """
    kept = decay.exp().unsqueeze(2)
    # Both reads in one pass over the old state: S_new^T q = kept S_old^T q + (k . q) u.
    old = torch.matmul(torch.stack((key, query), dim=2), state)
    delta = beta.unsqueeze(2) * (value - kept * old[:, :, 0])
    state.mul_(kept.unsqueeze(3)).addcmul_(key.unsqueeze(3), delta.unsqueeze(2))
    return kept * old[:, :, 1] + (key * query).sum(2, keepdim=True) * delta


def delta_tokens(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> Iterator[Tensor]:
    """The recurrence over a few tokens, [n, length, heads, ...]: gives each one's output
    [n, heads, value_dim] when `state` has taken it in."""
    for token in range(query.shape[1]):
        at = (slice(None), token)
        yield delta_step(query[at], key[at], value[at], decay[at], beta[at], state)


def delta_chunks(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence over [n, length, heads, ...] in chunks; returns outputs and the new state.

    A length over `CHUNK` must be a multiple of it. Padding needs key 0 and decay 0.
    """
    query, key, value, decay, beta = map(_by_chunk, (query, key, value, decay, beta))
    total = decay.cumsum(-1)  # log decay since the chunk began: [n, heads, chunks, c]
    # Masked before exp: above the diagonal the exponent is positive and may overflow.
    span = total.unsqueeze(-1) - total.unsqueeze(-2)
    upper = torch.ones_like(span[0, 0, 0], dtype=torch.bool).triu(1)
    span = span.masked_fill_(upper, -torch.inf).exp_()  # decay between two tokens, [.., c, c]
    scaled = key * beta.unsqueeze(-1)
    grown = total.exp().unsqueeze(-1)
    # Each token's delta depends on the deltas before it in the chunk: a unit triangular system.
    mixing = (scaled @ key.transpose(-1, -2)).mul_(span)
    sides = torch.cat((value * beta.unsqueeze(-1), scaled * grown), dim=-1)
    solved = torch.linalg.solve_triangular(mixing, sides, upper=False, unitriangular=True)
    deltas, reads = solved.split((value.shape[-1], key.shape[-1]), dim=-1)
    within = (query @ key.transpose(-1, -2)).mul_(span)
    asked = query * grown
    left = (key * (total[..., -1:] - total).exp().unsqueeze(-1)).transpose(-1, -2)
    kept = total[..., -1:].exp().unsqueeze(-1)  # [n, heads, chunks, 1, 1]
    outs = []
    for chunk in range(total.shape[2]):
        delta = deltas[:, :, chunk] - reads[:, :, chunk] @ state
        outs.append(asked[:, :, chunk] @ state + within[:, :, chunk] @ delta)
        state = kept[:, :, chunk] * state + left[:, :, chunk] @ delta
    return torch.stack(outs, dim=2).flatten(2, 3).transpose(1, 2), state


def _by_chunk(x: Tensor) -> Tensor:
    """[n, length, heads, ...] -> [n, heads, chunks, c, ...]"""
    size = min(CHUNK, x.shape[1])
    shape = (x.shape[0], x.shape[1] // size, size, *x.shape[2:])
    return x.reshape(shape).movedim(3, 1).contiguous()
