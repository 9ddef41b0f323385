"""Gated DeltaNet: linear attention whose memory is one matrix per head.

Yang et al., "Gated Delta Networks" (2024). Sequences meet only as entries of a batch dimension:
neither convolution nor state crosses a border.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kttrio.layers.cache import RecurrentCache, Trail
from kttrio.layers.delta_rule import Heads, delta_tokens, remembered
from kttrio.layers.linear import Linear
from kttrio.layers.norm import GatedRMSNorm
from kttrio.layers.recurrence import Recurrence
from kttrio.layers.runs import CHUNK, MAX_TOGETHER, Lanes, Run
from kttrio.layers.step import Step


class GatedDeltaNet(nn.Module):
    """Projections, short convolution, recurrence, gated norm.

    Rows of the input projection: queries and keys of all key heads, values of all value heads
    (these three are the convolution's channels), output gates, then per value head beta and
    decay. Value head h reads with key head h // (value_heads / key_heads).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        kernel: int,
        eps: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.key_heads, self.value_heads = key_heads, value_heads
        self.key_dim, self.value_dim, self.kernel = key_dim, value_dim, kernel
        self.channels = 2 * key_heads * key_dim + value_heads * value_dim
        gates = value_heads * value_dim
        self.in_proj = Linear(hidden_size, self.channels + gates + 2 * value_heads, dtype=dtype)
        self.conv = _vector(kernel, self.channels)  # newest token's factor last
        self.a_log = _vector(value_heads)
        self.dt_bias = _vector(value_heads)
        self.norm = GatedRMSNorm(value_dim, eps=eps)
        self.out_proj = Linear(gates, hidden_size, dtype=dtype)

    def forward(self, hidden: Tensor, step: Step, cache: RecurrentCache) -> Tensor:
        gates = self.value_heads * self.value_dim
        mixed, gate, beta, decay = self.in_proj(hidden).split(
            (self.channels, gates, self.value_heads, self.value_heads), dim=1
        )
        beta = beta.float().sigmoid()
        decay = F.softplus(decay.float() + self.dt_bias) * -self.a_log.exp()
        recalled = self._recalled(mixed, decay, beta, step=step, cache=cache)
        normed = self.norm(recalled, gate.view(recalled.shape))
        out: Tensor = self.out_proj(normed.flatten(1))
        return out

    def _recalled(
        self, mixed: Tensor, decay: Tensor, beta: Tensor, *, step: Step, cache: RecurrentCache
    ) -> Tensor:
        """What each token reads of its sequence's state: [tokens, heads, value_dim]"""
        index, outs = step.runs, []
        if index.decodes is not None:
            rows = slice(index.num_decodes)
            fed = Trail(index.decodes, *(x[rows].unsqueeze(1) for x in (mixed, decay, beta)))
            outs.append(self._decode(fed, step.recurrence, cache))
        for run in index.runs:
            fed = Trail(run.lanes, mixed[run.rows], decay[run.rows], beta[run.rows])
            if run.drafting:
                outs.append(self._decode(fed, step.recurrence, cache))
                drafts = (x[:, 1:] for x in (fed.mixed, fed.decay, fed.beta))
                cache.trail = Trail(run.lanes, *drafts)
            else:
                outs.append(self._prefill(fed, run, step.recurrence, cache))
        return outs[0] if index.order is None else torch.cat(outs)[index.order]

    def _decode(self, fed: Trail, recurrence: Recurrence, cache: RecurrentCache) -> Tensor:
        """The first token of each lane, which is remembered, and drafts after it, which are not:
        [n * length, heads, value_dim]"""
        columns, heads = self._feed(fed, cache)
        cache.conv.index_copy_(0, fed.lanes.slots, columns[:, 1 : self.kernel])
        return recurrence.decode(heads, cache.state, fed.lanes).flatten(0, 1)

    def _prefill(
        self, fed: Trail, run: Run, recurrence: Recurrence, cache: RecurrentCache
    ) -> Tensor:
        """All tokens of each lane: [n * length, heads, value_dim]"""
        columns, state = self._columns(fed, cache), remembered(cache.state, fed.lanes)
        outs = []
        for part in _parts(run):  # none of it is kept for the next: it has no name
            out, state = recurrence.chunks(
                _without(self._fed(columns, fed, part), run.padding[:, part]), state
            )
            outs.append(out)
        self._remember(columns, state, run.lengths, run.lanes, cache)
        return torch.cat(outs, dim=1).flatten(0, 1)

    def settle(self, lengths: Tensor, cache: RecurrentCache) -> None:
        """Bring the states that the last step left behind forward: lane i by those of its drafts
        that stand, its first `lengths[i]` tokens without the very first."""
        fed, cache.trail = cache.trail, None
        if fed is None:
            raise ValueError("the last step had no drafts: every state is settled")
        going = (lengths > 1).nonzero().squeeze(1)
        if len(going):
            accepted = lengths[going] - 1
            self._advance(_lanes_of(fed, going, int(accepted.max())), accepted, cache)

    def _advance(self, fed: Trail, lengths: Tensor, cache: RecurrentCache) -> None:
        """Take in the first `lengths[i]` tokens of lane i."""
        columns, heads = self._feed(fed, cache)
        padding = torch.arange(heads.key.shape[1], device=lengths.device) >= lengths.unsqueeze(1)
        state = remembered(cache.state, fed.lanes)
        for _ in delta_tokens(*_without(heads, padding), state):
            pass  # what these tokens gave out is long used
        self._remember(columns, state, lengths, fed.lanes, cache)

    def _feed(self, fed: Trail, cache: RecurrentCache) -> tuple[Tensor, Heads]:
        columns = self._columns(fed, cache)
        return columns, self._fed(columns, fed, slice(0, fed.mixed.shape[1]))

    def _columns(self, fed: Trail, cache: RecurrentCache) -> Tensor:
        """What the convolution sees, history included: [n, kernel - 1 + length, channels]"""
        return torch.cat((remembered(cache.conv, fed.lanes), fed.mixed), dim=1)

    def _fed(self, columns: Tensor, fed: Trail, part: slice) -> Heads:
        """What tokens of each lane are to the recurrence."""
        seen = columns[:, part.start : part.stop + self.kernel - 1]
        return Heads(*self._heads(self._convolve(seen)), fed.decay[:, part], fed.beta[:, part])

    def _remember(
        self,
        columns: Tensor,
        state: Tensor,
        lengths: Tensor,
        lanes: Lanes,
        cache: RecurrentCache,
    ) -> None:
        """Each lane's last columns before its length, and its state."""
        lane = torch.arange(len(columns), device=columns.device).unsqueeze(1)
        newest = lengths.unsqueeze(1) + torch.arange(self.kernel - 1, device=columns.device)
        cache.conv.index_copy_(0, lanes.slots, columns[lane, newest])
        cache.state.index_copy_(0, lanes.slots, state)

    def _convolve(self, columns: Tensor) -> Tensor:
        """Channel by channel: [n, kernel - 1 + length, channels] -> [n, length, channels]"""
        columns, length = columns.float(), columns.shape[1] - self.kernel + 1
        out = columns[:, :length] * self.conv[0]
        for tap in range(1, self.kernel):
            out.addcmul_(columns[:, tap : tap + length], self.conv[tap])
        return out

    def _heads(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Convolved channels to unit queries and keys and values, one of each per value head."""
        keys = self.key_heads * self.key_dim
        active = F.silu(convolved)
        lead = active.shape[:-1]
        pair = active[..., : 2 * keys].reshape(*lead, 2 * self.key_heads, self.key_dim)
        pair = pair * torch.rsqrt(pair.square().sum(-1, keepdim=True) + 1e-6)
        pair = pair.repeat_interleave(self.value_heads // self.key_heads, dim=-2)
        query, key = pair.chunk(2, dim=-2)
        value = active[..., 2 * keys :].reshape(*lead, self.value_heads, self.value_dim)
        return query * self.key_dim**-0.5, key, value


def _parts(run: Run) -> Iterator[slice]:
    """Of each lane's tokens, whole chunks: in float32, and in as many copies as the recurrence
    needs, all of them at once would take more memory than anything else in a step."""
    lanes, length = run.padding.shape
    size = max(MAX_TOGETHER // (lanes * CHUNK), 1) * CHUNK
    return (slice(first, min(first + size, length)) for first in range(0, length, size))


def _without(heads: Heads, padding: Tensor) -> Heads:
    """Tokens that pad a lane, [n, length] bool, leave its state alone."""
    key = heads.key.masked_fill(padding[:, :, None, None], 0)
    return heads._replace(key=key, decay=heads.decay.masked_fill(padding.unsqueeze(2), 0))


def _lanes_of(fed: Trail, chosen: Tensor, length: int) -> Trail:
    """The first tokens of the chosen lanes; those with drafts have all begun."""
    parts = (x[chosen, :length] for x in (fed.mixed, fed.decay, fed.beta))
    return Trail(Lanes(fed.lanes.slots[chosen], None), *parts)


def _vector(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
