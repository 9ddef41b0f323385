"""The gated delta rule: what `layers/delta_rule.py` says, for single tokens and in chunks.

Yang et al., "Gated Delta Networks" (2024). In chunks as in "Parallelizing Linear Transformers with
the Delta Rule over Sequence Length" (2024), three kernels: the triangular system of each chunk is
solved apart, only the state goes chunk by chunk, and what is read of it is computed apart again.
States and sums are float32, factors of products on tensor cores tf32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kttrio.layers.delta_rule import Heads
from kttrio.layers.runs import CHUNK, Lanes

_CHUNK = tl.constexpr(CHUNK)
_PRECISION = tl.constexpr("tf32")
_SEGMENT = 16  # chunks that go through the three at once: bounds the memory between them
_VALUES = 32  # columns of the state that a program holds


def decode(heads: Heads, states: Tensor, lanes: Lanes) -> Tensor:
    """As `Recurrence.decode`."""
    heads = Heads(*(x.contiguous() for x in heads))
    lanes_, length, num_heads, key_dim = heads.key.shape
    value_dim = heads.value.shape[-1]
    out = heads.value.new_empty(heads.value.shape)
    fresh = lanes.slots if lanes.fresh is None else lanes.fresh
    grid = (lanes_ * num_heads, triton.cdiv(value_dim, _VALUES))
    _decode[grid](
        *(*heads, states, lanes.slots, fresh, out),
        *(length, num_heads, key_dim, value_dim),
        FRESH=lanes.fresh is not None,
        KEYS=triton.next_power_of_2(key_dim),
        VALUES=_VALUES,
        enable_fp_fusion=True,
    )
    return out


def chunks(heads: Heads, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `Recurrence.chunks`, for any length; `state` becomes the new one."""
    heads = Heads(*(x.contiguous() for x in heads))
    out = heads.value.new_empty(heads.value.shape)
    num_chunks = triton.cdiv(heads.key.shape[1], CHUNK)
    for first in range(0, num_chunks, _SEGMENT):
        count = min(_SEGMENT, num_chunks - first)
        _pass_segment(heads, state, out, range(first, first + count))
    return out, state


def _pass_segment(heads: Heads, state: Tensor, out: Tensor, chunks: range) -> None:
    lanes, length, num_heads, key_dim = heads.key.shape
    value_dim = heads.value.shape[-1]
    rows = (lanes, num_heads, len(chunks), CHUNK)
    deltas, reads, totals = (state.new_empty(*rows, size) for size in (value_dim, key_dim, 1))
    begins = state.new_empty(lanes, num_heads, len(chunks), key_dim, value_dim)
    sizes = (length, num_heads, key_dim, value_dim, chunks.start, len(chunks))
    constants = {
        "KEYS": max(16, triton.next_power_of_2(key_dim)),
        "VALUES": _VALUES,
        "num_warps": 8,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    programs, columns = lanes * num_heads, triton.cdiv(value_dim, _VALUES)
    given = (heads.key, heads.value, heads.decay, heads.beta)
    _solve[(programs * len(chunks),)](*given, deltas, reads, totals, *sizes, **constants)
    _pass[(programs, columns)](
        *(heads.key, deltas, reads, totals, begins, state), *sizes, **constants
    )
    _recall[(programs * len(chunks), columns)](
        *(heads.query, heads.key, deltas, totals, begins, out), *sizes, **constants
    )


@triton.jit
def _decode(
    query,
    key,
    value,
    decay,
    beta,
    states,
    slots,
    fresh,
    out,
    length,
    num_heads,
    key_dim,
    value_dim,
    FRESH: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Some columns of one head's state, token by token."""
    lane = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    k = tl.arange(0, KEYS)
    v = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    slot = tl.load(slots + lane).to(tl.int64)
    places = states + (slot * num_heads + head) * key_dim * value_dim
    places += k[:, None] * value_dim + v[None, :]
    kept = (k < key_dim)[:, None] & (v < value_dim)[None, :]
    num_held = key_dim
    if FRESH:  # what the slot of a new sequence holds is not even read: it may be NaN
        num_held = tl.where(tl.load(fresh + lane).to(tl.int32) != 0, 0, key_dim)
    held = (k < num_held)[:, None] & (v < value_dim)[None, :]
    state = tl.load(places, mask=held, other=0)
    for token in range(length):
        at = (lane.to(tl.int64) * length + token) * num_heads + head
        keys = tl.load(key + at * key_dim + k, mask=k < key_dim, other=0)
        queries = tl.load(query + at * key_dim + k, mask=k < key_dim, other=0)
        values = tl.load(value + at * value_dim + v, mask=v < value_dim, other=0)
        state *= tl.exp(tl.load(decay + at))
        delta = tl.load(beta + at) * (values - tl.sum(state * keys[:, None], axis=0))
        state += keys[:, None] * delta[None, :]
        recalled = tl.sum(state * queries[:, None], axis=0)
        tl.store(out + at * value_dim + v, recalled, mask=v < value_dim)
        if token == 0:
            tl.store(places, state, mask=kept)


@triton.jit
def _load(x, rows, kept, size, SIZE: tl.constexpr):
    """[CHUNK, SIZE]: columns of these rows; zero outside."""
    columns = tl.arange(0, SIZE)
    inside = kept[:, None] & (columns < size)[None, :]
    return tl.load(x + rows[:, None] * size + columns[None, :], mask=inside, other=0)


@triton.jit
def _span(totals, others, kept):
    """Decay between two tokens. Masked before exp: elsewhere the exponent is positive and may
    overflow."""
    return tl.exp(tl.where(kept, totals[:, None] - others[None, :], float("-inf")))


@triton.jit
def _inverse(mixing):
    """Of a unit lower triangular matrix, given what is below its diagonal: row by row, as each
    depends on those before it."""
    row = tl.arange(0, _CHUNK)
    result = -mixing
    for i in range(1, _CHUNK):
        own = tl.sum(tl.where(row[:, None] == i, result, 0.0), axis=0)
        own += tl.sum(own[:, None] * result, axis=0)
        result = tl.where(row[:, None] == i, own[None, :], result)
    return result + tl.where(row[:, None] == row[None, :], 1.0, 0.0)


@triton.jit
def _solve(
    key,
    value,
    decay,
    beta,
    deltas,
    reads,
    totals,
    length,
    num_heads,
    key_dim,
    value_dim,
    first_chunk,
    num_chunks,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """One chunk of one head: each token's delta were the state zero, and what it reads of it."""
    chunk = tl.program_id(0) % num_chunks
    lane = tl.program_id(0) // num_chunks // num_heads
    head = tl.program_id(0) // num_chunks % num_heads
    row = tl.arange(0, _CHUNK)
    token = (first_chunk + chunk) * _CHUNK + row
    kept = token < length
    rows = (lane.to(tl.int64) * length + token) * num_heads + head
    places = tl.program_id(0).to(tl.int64) * _CHUNK + row
    total = tl.cumsum(tl.load(decay + rows, mask=kept, other=0), axis=0)
    tl.store(totals + places, total)
    factor = tl.load(beta + rows, mask=kept, other=0)
    keys = _load(key, rows, kept, key_dim, KEYS)
    scaled = keys * factor[:, None]
    mixing = tl.dot(scaled, tl.trans(keys), input_precision=_PRECISION)
    mixing *= _span(total, total, row[:, None] > row[None, :])
    inverse = _inverse(mixing)
    read = tl.dot(inverse, scaled * tl.exp(total)[:, None], input_precision=_PRECISION)
    columns = tl.arange(0, KEYS)
    read_places = reads + places[:, None] * key_dim + columns[None, :]
    tl.store(read_places, read, mask=(columns < key_dim)[None, :] & (row >= 0)[:, None])
    for start in range(0, value_dim, VALUES):
        v = start + tl.arange(0, VALUES)
        inside = kept[:, None] & (v < value_dim)[None, :]
        values = tl.load(value + rows[:, None] * value_dim + v[None, :], mask=inside, other=0)
        delta = tl.dot(inverse, values * factor[:, None], input_precision=_PRECISION)
        delta_places = deltas + places[:, None] * value_dim + v[None, :]
        tl.store(delta_places, delta, mask=(v < value_dim)[None, :] & (row >= 0)[:, None])


@triton.jit
def _pass(
    key,
    deltas,
    reads,
    totals,
    begins,
    states,
    length,
    num_heads,
    key_dim,
    value_dim,
    first_chunk,
    num_chunks,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Some columns of one head's state, chunk by chunk: what each chunk begins with is kept, and
    its deltas become those of the real state."""
    lane = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    row = tl.arange(0, _CHUNK)
    k = tl.arange(0, KEYS)
    v = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    size = key_dim * value_dim
    cells = k[:, None] * value_dim + v[None, :]
    held = (k < key_dim)[:, None] & (v < value_dim)[None, :]
    inside = (row >= 0)[:, None] & (v < value_dim)[None, :]
    state = tl.load(states + tl.program_id(0).to(tl.int64) * size + cells, mask=held, other=0)
    for chunk in range(num_chunks):
        number = tl.program_id(0).to(tl.int64) * num_chunks + chunk
        tl.store(begins + number * size + cells, state, mask=held)
        solved = number * _CHUNK + row
        places = deltas + solved[:, None] * value_dim + v[None, :]
        read = _load(reads, solved, row >= 0, key_dim, KEYS)
        delta = tl.load(places, mask=inside, other=0)
        delta -= tl.dot(read, state, input_precision=_PRECISION)
        tl.store(places, delta, mask=inside)
        token = (first_chunk + chunk) * _CHUNK + row
        rows = (lane.to(tl.int64) * length + token) * num_heads + head
        keys = _load(key, rows, token < length, key_dim, KEYS)
        last = tl.load(totals + number * _CHUNK + _CHUNK - 1)
        left = keys * tl.exp(last - tl.load(totals + solved))[:, None]
        state = tl.dot(tl.trans(left), delta, state * tl.exp(last), input_precision=_PRECISION)
    tl.store(states + tl.program_id(0).to(tl.int64) * size + cells, state, mask=held)


@triton.jit
def _recall(
    query,
    key,
    deltas,
    totals,
    begins,
    out,
    length,
    num_heads,
    key_dim,
    value_dim,
    first_chunk,
    num_chunks,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """What the tokens of one chunk read: of the state it began with, and of each other's deltas."""
    chunk = tl.program_id(0) % num_chunks
    lane = tl.program_id(0) // num_chunks // num_heads
    head = tl.program_id(0) // num_chunks % num_heads
    row = tl.arange(0, _CHUNK)
    k = tl.arange(0, KEYS)
    v = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    token = (first_chunk + chunk) * _CHUNK + row
    rows = (lane.to(tl.int64) * length + token) * num_heads + head
    number = tl.program_id(0).to(tl.int64)
    total = tl.load(totals + number * _CHUNK + row)
    queries = _load(query, rows, token < length, key_dim, KEYS)
    keys = _load(key, rows, token < length, key_dim, KEYS)
    within = tl.dot(queries, tl.trans(keys), input_precision=_PRECISION)
    within *= _span(total, total, row[:, None] >= row[None, :])
    held = (k < key_dim)[:, None] & (v < value_dim)[None, :]
    cells = k[:, None] * value_dim + v[None, :]
    state = tl.load(begins + number * key_dim * value_dim + cells, mask=held, other=0)
    recalled = tl.dot(queries, state, input_precision=_PRECISION) * tl.exp(total)[:, None]
    inside = (row >= 0)[:, None] & (v < value_dim)[None, :]
    places = deltas + (number * _CHUNK + row)[:, None] * value_dim + v[None, :]
    delta = tl.load(places, mask=inside, other=0)
    recalled = tl.dot(within, delta, recalled, input_precision=_PRECISION)
    out_places = out + rows[:, None] * value_dim + v[None, :]
    tl.store(out_places, recalled, mask=(token < length)[:, None] & (v < value_dim)[None, :])
