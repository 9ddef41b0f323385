"""The gated MLPs of many experts at once, each for the tokens that chose it.

Experts stand in stacks, in the format they are stored in; where they come from and why they are
here is not known. This is the reference in torch; on a GPU `triton/grouped.py` does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kttrio.weights.formats import base as formats
from kttrio.weights.formats.base import Packed


class Stacks(NamedTuple):
    """Experts of one shape, one to a slot: data and scales [slots, ...]."""

    gate: Packed
    up: Packed
    down: Packed


def grouped_mlp(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    stacks: tuple[Packed, Packed, Packed],
    *,
    form: str,
    out: Tensor,
    fixed: bool = False,
) -> None:
    """out[t] += sum over k of weights[t, k] * down(silu(gate x[t]) * up x[t]) of slot ids[t, k].

    x [tokens, hidden] bfloat16 or float32; ids int32 [tokens, top_k], negative ones are skipped;
    weights float32; stacks as format `form` stores them; out float32 [tokens, hidden]. Sums are
    float32, what lies between the two matrix products is rounded to x's dtype. Slots that nobody
    chose may hold anything.

    `fixed`: shapes do not depend on ids and the host does not look at them, so that a step can be
    captured. On a GPU that is always so; here it takes a product for each id, skipped ones too.
    """
    if x.is_cuda:
        from kttrio.layers.triton.grouped import grouped_mlp as fused

        fused(x, ids, weights, stacks, form=form, out=out)
    elif len(stacks[0].data):
        by_slot = _each_choice if fixed else _each_slot
        for tokens, slot, shares in by_slot(ids, weights):
            expert = (_dequantized(form, stack, slot) for stack in stacks)
            product = _gated_mlp(x[tokens], *expert).mul_(shares)
            # A skipped token's product may be anything, even NaN.
            out.index_add_(0, tokens, product.masked_fill_(shares == 0, 0))


def _each_slot(ids: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Slots that are hit: their tokens [n], the slot [1], the tokens' weights [n, 1]."""
    sorted_ids, order = ids.flatten().sort(stable=True)
    slots, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    for slot, choices in zip(slots, torch.split(order, counts.tolist()), strict=True):
        if slot >= 0:
            shares = weights.flatten()[choices].unsqueeze(1)
            yield choices // ids.shape[1], slot.view(1), shares


def _each_choice(ids: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same, token by token; what is skipped goes to slot 0 with weight 0."""
    shares = weights.masked_fill(ids < 0, 0)
    slots = ids.clamp(min=0)
    for token in range(ids.shape[0]):
        row = torch.full((1,), token, device=ids.device)
        for place in range(ids.shape[1]):
            at = (slice(token, token + 1), place)
            yield row, slots[at], shares[at].unsqueeze(1)


def _dequantized(form: str, stack: Packed, slot: Tensor) -> Tensor:
    data = stack.data.index_select(0, slot)[0]
    scale = None if stack.scale is None else stack.scale.index_select(0, slot)[0]
    return formats.find(form).dequantize(Packed(data, scale), torch.float32)


def _gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x [n, hidden] in its own dtype, matrices float32; result float32."""
    wide = x.float()
    active = F.silu(F.linear(wide, gate)) * F.linear(wide, up)
    return F.linear(active.to(x.dtype).float(), down)
