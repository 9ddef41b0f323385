"""One token from one row of logits: exact order, exact sums, draws that never see the batch.

A row's probabilities are held as integers (2**40 for the most probable token), so that their sums
do not depend on the order of addition, and tokens of equal logit are ordered by id. Hence a
row's token is a function of its own logits, parameters and uniform number, whatever is computed
beside it. Penalties, biases and requests are unknown here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kttrio.layers.batch import sent

_MASK64 = 2**64 - 1
_BLOCK_ELEMENTS = 2**18  # blocks of rows whose temporaries stay in the processor's cache
_FIXED_POINT = float(2**40)
MIN_TEMPERATURE = 1e-6  # at or below, a row is greedy
_WIDTHS = (32, 256)  # best tokens looked at, before a row is done over its whole vocabulary
_TOP_BUCKET = (127 + 40) * 64  # of the weight 2**40
_NUM_BUCKETS = 41 * 64  # down to the weight 1; weight 0 shares the last


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """Numbers in [0, 1), each a pure function of its (seed, position).

    The SplitMix64 generator (Steele, Lea, Flood 2014) as a counter: its output function is applied
    to the seed, then to the result advanced by `position` increments. Seeds count modulo 2**64.
    """
    state = np.array([seed & _MASK64 for seed in seeds], dtype=np.uint64)
    increment = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
    steps = np.array(positions, dtype=np.uint64) + np.uint64(1)
    mixed = _mix(_mix(state + increment) + steps * increment)
    return (mixed >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def ordered_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, best first, the lower id first where equal: values, ids. Those of
    -inf, which are never drawn, have no order.

    `torch.topk` leaves open which of several equal values it takes, so the rows where that
    matters, at the k-th place, are found by one more value and done by hand.
    """
    if k >= logits.shape[-1]:
        ordered = logits.sort(stable=True, dim=-1, descending=True)
        return ordered.values, ordered.indices
    values, ids = logits.topk(k + 1, dim=-1)
    last = values[:, k - 1]
    tied = ((values[:, k] == last) & (last > -torch.inf)).nonzero().flatten().tolist()
    ids, order = ids[:, :k].sort(dim=-1)
    values, order = values.gather(-1, order).sort(stable=True, dim=-1, descending=True)
    ids = ids.gather(-1, order)
    for row in tied:
        candidates = (logits[row] >= values[row, k - 1]).nonzero().flatten()
        best = logits[row, candidates].sort(stable=True, descending=True)
        ids[row] = candidates[best.indices[:k]]
    return values, ids


@dataclass(frozen=True, slots=True)
class DrawParams:
    """How each row is drawn: [rows] float64 on the host, but `top_k` int64 with 0 for off."""

    temperature: NDArray[np.float64]
    top_p: NDArray[np.float64]
    top_k: NDArray[np.int64]
    min_p: NDArray[np.float64]
    uniform: NDArray[np.float64]

    def rows(self, index: Sequence[int] | slice) -> DrawParams:
        return DrawParams(
            self.temperature[index],
            self.top_p[index],
            self.top_k[index],
            self.min_p[index],
            self.uniform[index],
        )


def index_of(rows: Sequence[int], of: Tensor) -> Tensor | slice:
    """What takes these rows, in rising order; a list would have the host wait for the device."""
    return slice(None) if len(rows) == len(of) else sent(rows, of.device)


def draw_unfiltered(logits: Tensor, params: DrawParams) -> Tensor:
    """Tokens drawn from the whole vocabulary; only temperature and uniform count."""
    best = logits.amax(-1, keepdim=True)
    tokens = [
        _invert(_weights(logits[rows], best[rows], params.rows(rows)), params.rows(rows))
        for rows in _row_blocks(logits)
    ]
    return torch.cat(tokens)


def draw_filtered(logits: Tensor, params: DrawParams) -> Tensor:
    """Tokens drawn after top_k, then top_p of what it left, then min_p of the best.

    top_p keeps the shortest run of best tokens that holds at least this share; the best token
    always stays. Nearly always a few best tokens are enough; which rows need more, and how they
    are then drawn, follows from the row alone.
    """
    best = logits.amax(-1, keepdim=True)
    totals = _totals(logits, best, params)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    waiting = list(range(len(logits)))
    for width in _WIDTHS:
        ready = [row for row in waiting if params.top_k[row] < width]
        if not ready or width >= logits.shape[-1]:
            continue
        at = index_of(ready, logits)
        drawn, ended = _draw_among(logits[at], best[at], totals[at], params.rows(ready), width)
        tokens[at] = drawn
        done = {row for row, end in zip(ready, ended.tolist(), strict=True) if end}
        waiting = [row for row in waiting if row not in done]
    for row in waiting:
        tokens[row : row + 1] = _draw_from_all(logits[row : row + 1], best[row], params.rows([row]))
    return tokens


def _draw_among(
    logits: Tensor, best: Tensor, totals: Tensor, params: DrawParams, width: int
) -> tuple[Tensor, Tensor]:
    """Draw among each row's `width` best; False where the filters keep more than these."""
    values, ids = ordered_topk(logits, width)
    weights = _weights(values, best, params)
    keep = _kept(weights, totals, params)
    places = _invert(weights * keep, params)
    return ids.gather(-1, places[:, None]).squeeze(-1), ~keep[:, -1]


def _draw_from_all(logits: Tensor, best: Tensor, params: DrawParams) -> Tensor:
    """Draw one row that keeps many tokens, without sorting all: logits [1, vocab] -> [1].

    A large top_k is a `topk` and no more. Else the weights are summed in buckets of similar size;
    only the bucket in which top_p's share ends is put in order.
    """
    top_k = int(params.top_k[0])
    if top_k:
        values, ids = ordered_topk(logits, top_k)
        weights = _weights(values, best, params)
        keep = _kept(weights, weights.new_zeros(1, 1), params)
        return ids[0, _invert(weights * keep, params)]
    weights = _weights(logits, best, params)
    keep = weights.double() >= float(params.min_p[0]) * _FIXED_POINT
    if params.top_p[0] < 1.0:
        keep &= _in_top_p(weights[0], logits[0], float(params.top_p[0]))
    return _invert(weights * keep, params)


def _in_top_p(weights: Tensor, logits: Tensor, top_p: float) -> Tensor:
    """[vocab] bool: the best tokens that hold the share top_p, the last one included."""
    share = max(top_p * float(weights.sum()), 1.0)
    bucket = _buckets(weights)
    mass = weights.new_zeros(_NUM_BUCKETS).scatter_add_(0, bucket, weights)
    above = mass.cumsum(0) - mass
    last = int((above.double() < share).nonzero()[-1])
    border = (bucket == last).nonzero().flatten()
    border = border[logits[border].sort(stable=True, descending=True).indices]
    mass_before = above[last] + weights[border].cumsum(0) - weights[border]
    keep = bucket < last
    keep[border] = mass_before.double() < share
    return keep


def _buckets(weights: Tensor) -> Tensor:
    """Bucket 0 for the heaviest, falling with the weight, 64 to each factor of two.

    Read from the bits of a float32, whose integer order is its own: exponent, six mantissa bits.
    """
    octave_parts = weights.float().view(torch.int32) >> 17
    return (_TOP_BUCKET - octave_parts).clamp_(max=_NUM_BUCKETS - 1).to(torch.int64)


def _kept(weights: Tensor, totals: Tensor, params: DrawParams) -> Tensor:
    """[rows, places] bool: which of the best tokens, in order, the filters keep: always a run.

    `totals` [rows, 1] is the weight that top_p shares out where top_k is off.
    """
    top_k = _column(params.top_k, weights)
    place = torch.arange(weights.shape[-1], device=weights.device)
    in_top_k = (top_k == 0) | (place < top_k)
    weights = weights * in_top_k
    mass = weights.cumsum(-1)
    totals = torch.where(top_k == 0, totals, mass[:, -1:]).double()
    top_p, min_p = _column(params.top_p, weights), _column(params.min_p, weights)
    keep = in_top_k & ((top_p >= 1.0) | ((mass - weights).double() < top_p * totals))
    keep &= weights.double() >= min_p * _FIXED_POINT
    keep[:, 0] = True
    return keep


def _totals(logits: Tensor, best: Tensor, params: DrawParams) -> Tensor:
    """[rows, 1]: the weight of the whole vocabulary where top_p asks for its share, else 0."""
    totals = torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device)
    asking = np.flatnonzero((params.top_k == 0) & (params.top_p < 1.0)).tolist()
    for rows in _row_blocks(logits):
        block = asking[rows]
        if block:
            weights = _weights(logits[block], best[block], params.rows(block))
            totals[block] = weights.sum(-1, keepdim=True)
    return totals


def _weights(logits: Tensor, best: Tensor, params: DrawParams) -> Tensor:
    """exp((logit - best) / temperature) as int64 fixed point; the best token weighs 2**40."""
    temperature = _column(params.temperature.clip(min=MIN_TEMPERATURE), logits)
    scaled = (logits - best).div_(temperature.float())
    return scaled.exp_().mul_(_FIXED_POINT).to(torch.int64)


def _invert(weights: Tensor, params: DrawParams) -> Tensor:
    """[rows]: the place at which the running sum of weights passes uniform * total."""
    mass = weights.cumsum(-1)
    total = mass[:, -1:]
    target = (_column(params.uniform, weights) * total.double()).to(torch.int64)
    place = torch.searchsorted(mass, torch.minimum(target, total - 1), right=True)
    return place.squeeze(-1).clamp_(max=weights.shape[-1] - 1)  # NaN weights have no such place


def _column(values: NDArray[np.float64] | NDArray[np.int64], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device, non_blocking=True)[:, None]


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // logits.shape[-1])
    return (slice(row, row + step) for row in range(0, len(logits), step))
