"""The gated MLPs of many experts at once: what `layers/grouped.py` says, in two products and a sum.

Choices (a token and one of its slots) of the same slot form blocks of rows; each program computes
a tile of one block. Few choices stand each for itself: weights that two tokens share are then read
twice, mostly from the cache, and nothing is sorted. Sorting happens on the device and grids have
the size of the worst case, so the host never waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kttrio.layers.triton.products import (
    Coding,
    add_step,
    dot_dtype,
    load_scales,
    load_tile,
    load_weights,
    pointers,
    side_by_side,
)
from kttrio.layers.triton.scratch import SUM_COLUMNS, columns_at_once, tokens_at_once
from kttrio.weights.formats.base import Packed

_UNSORTED = 64  # choices up to which each is a block of its own


class Tiles(NamedTuple):
    """What a program computes at once. The steps of all stages, of x and two matrices, must fit
    into the 99 KiB of shared memory that consumer chips have."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


class Blocks(NamedTuple):
    """Positions [first, last) of `order` belong to one slot; all int64."""

    slots: Tensor  # [blocks]
    firsts: Tensor  # [blocks]
    lasts: Tensor  # [blocks], = first where a block is not used
    order: Tensor  # [choices], sorted by slot


def grouped_mlp(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    stacks: tuple[Packed, Packed, Packed],
    *,
    form: str,
    out: Tensor,
) -> None:
    """As `layers.grouped.grouped_mlp`; all tensors contiguous."""
    gate, up, down = stacks
    if not ids.numel() or not len(gate.data):
        return
    size = tokens_at_once(ids.shape[1], gate.data.shape[1], x.itemsize)
    pieces = (torch.split(tensor, size) for tensor in (x, ids, weights, out))
    for tokens, chosen, shares, sums in zip(*pieces, strict=True):
        call = _plan(tokens, chosen, form, len(gate.data))
        active = call.gate_up(tokens, gate, up)
        columns = columns_at_once(chosen.numel(), x.shape[1])
        for start in range(0, x.shape[1], columns):
            part = range(start, min(start + columns, x.shape[1]))
            call.add_down(active, shares, down, sums, part)


def _plan(x: Tensor, ids: Tensor, form: str, num_slots: int) -> _Call:
    tiles = _tiles(x, ids.numel())
    blocks = None
    if ids.numel() > _UNSORTED:
        blocks = sort_by_slot(ids, num_slots=num_slots, rows=tiles.rows)
    return _Call(ids, form, tiles, blocks, dot_dtype(x))


def sort_by_slot(ids: Tensor, *, num_slots: int, rows: int) -> Blocks:
    """Blocks of at most `rows` choices of one slot; of choices that are skipped there are none."""
    keys, order = ids.flatten().sort()
    ascending = torch.arange(num_slots + 1, dtype=ids.dtype, device=ids.device)
    bounds = torch.searchsorted(keys, ascending)
    blocks = (bounds.diff() + (rows - 1)) // rows
    blocks_before = F.pad(blocks.cumsum(0), (1, 0))
    number = torch.arange(_most_blocks(ids, num_slots, rows), device=ids.device)
    slots = torch.searchsorted(blocks_before[1:], number, right=True)
    used = slots < num_slots
    slots = slots.clamp_(max=num_slots - 1)
    firsts = bounds[slots] + (number - blocks_before[slots]) * rows
    lasts = torch.minimum(firsts + rows, bounds[slots + 1])
    return Blocks(slots, firsts, torch.where(used, lasts, firsts), order)


def _most_blocks(ids: Tensor, num_slots: int, rows: int) -> int:
    """Whole blocks, and one that is not whole for each slot that is hit."""
    return ids.numel() // rows + min(num_slots, ids.numel())


def _tiles(x: Tensor, num_choices: int) -> Tiles:
    """Where few tokens meet many experts memory is the limit: many small programs keep it busy."""
    stages = 1 if x.dtype is torch.float32 else 3
    if num_choices <= 1024:
        return Tiles(rows=16, columns=32, num_warps=4, num_stages=stages)
    if num_choices <= 8192:
        return Tiles(rows=32, columns=64, num_warps=4, num_stages=stages)
    return Tiles(rows=64, columns=64, num_warps=8, num_stages=min(stages, 2))


@dataclass(frozen=True, slots=True)
class _Call:
    """What both products of a call have in common."""

    ids: Tensor
    form: str
    tiles: Tiles
    blocks: Blocks | None
    """None: each choice for itself, as `ids` has them."""
    dot: tl.dtype

    def gate_up(self, x: Tensor, gate: Packed, up: Packed) -> Tensor:
        """silu(gate x) * up x of each choice, in order: [choices, width]"""
        width = gate.data.shape[1]
        active = x.new_empty(self.ids.numel(), width)
        rows = side_by_side(x) if self.form == "int4" else x
        _gate_up[self._grid(width)](
            *(rows, active, *self._places()),
            *(*pointers(self.form, gate), *pointers(self.form, up)),
            *(x.shape[1], width, self.ids.shape[1]),
            **self._constants(gate),
        )
        return active

    def add_down(
        self, active: Tensor, weights: Tensor, down: Packed, out: Tensor, columns: range
    ) -> None:
        """Add each token's sum of weight * down(active) to `out`: these columns of it."""
        product = out.new_empty(self.ids.numel(), len(columns))
        _down[self._grid(len(columns))](
            *(active, product, weights, *self._places(), *pointers(self.form, down)),
            *(active.shape[1], down.data.shape[1], columns.start, columns.stop),
            **self._constants(down),
        )
        _sum[len(out), triton.cdiv(len(columns), SUM_COLUMNS)](
            *(product, self.ids, out, out.shape[1]),
            *(columns.start, columns.stop, self.ids.shape[1]),
            COLUMNS=SUM_COLUMNS,
            enable_fp_fusion=True,
        )

    def _grid(self, columns: int) -> tuple[int]:
        """One axis, for the others end at 65535; a block's columns, which share x, side by side."""
        blocks = self.ids.numel() if self.blocks is None else len(self.blocks.slots)
        return (blocks * triton.cdiv(columns, self.tiles.columns),)

    def _places(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (self.ids,) * 4 if self.blocks is None else self.blocks

    def _constants(self, stack: Packed) -> dict[str, object]:
        return {
            **Coding.of(self.form, stack).constants(),
            "SORTED": self.blocks is not None,
            "ROWS": self.tiles.rows,
            "COLUMNS": self.tiles.columns,
            "DOT": self.dot,
            "num_warps": self.tiles.num_warps,
            "num_stages": self.tiles.num_stages,
            "enable_fp_fusion": True,
        }


@triton.jit
def _block(slots, firsts, lasts, block, SORTED: tl.constexpr):
    """A block's slot, and its first and last position; none where nothing is to do."""
    slot = tl.load(slots + block).to(tl.int64)
    first = block.to(tl.int64)
    last = first + (slot >= 0).to(tl.int64)
    if SORTED:
        first = tl.load(firsts + block)
        last = tl.load(lasts + block)
    return slot, first, last


@triton.jit
def _gate_up(
    x,
    active,
    slots,
    firsts,
    lasts,
    order,
    gate,
    gate_scale,
    up,
    up_scale,
    depth,
    width,
    top_k,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    PER_BYTE: tl.constexpr,
    SORTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of both products, which meet before they are stored; for int4 even columns first."""
    num_tiles = tl.cdiv(width, COLUMNS)
    slot, first, last = _block(slots, firsts, lasts, tl.program_id(0) // num_tiles, SORTED)
    if first >= last:
        return
    positions = first + tl.arange(0, ROWS)
    kept = positions < last
    choices = positions
    if SORTED:
        choices = tl.load(order + positions, mask=kept, other=0)
    x_rows = x + choices // top_k * depth
    n = tl.program_id(0) % num_tiles * COLUMNS + tl.arange(0, COLUMNS)
    n_kept = n < width
    w_rows = (slot * width + n) * (depth // PER_BYTE)
    s_rows = (slot * tl.cdiv(width, SCALE_ROWS) + n // SCALE_ROWS) * tl.cdiv(depth, GROUP)
    gates = tl.zeros((ROWS, COLUMNS), tl.float32)
    ups = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = depth // PER_BYTE
    SIZE: tl.constexpr = GROUP // PER_BYTE
    for step in range(tl.cdiv(depth, GROUP)):
        low = load_tile(x_rows, kept, step * SIZE, end, SIZE).to(DOT)
        high = low
        if PER_BYTE == 2:
            high = load_tile(x_rows + end, kept, step * SIZE, end, SIZE).to(DOT)
        codes = load_weights(gate + w_rows, n_kept, step * SIZE, end, SIZE)
        scale = load_scales(gate_scale + s_rows + step, n_kept, FORM)
        gates = add_step(gates, low, high, codes, scale, FORM, DOT)
        codes = load_weights(up + w_rows, n_kept, step * SIZE, end, SIZE)
        scale = load_scales(up_scale + s_rows + step, n_kept, FORM)
        ups = add_step(ups, low, high, codes, scale, FORM, DOT)
    result = gates * tl.sigmoid(gates) * ups
    if PER_BYTE == 2:
        n = n // 2 + n % 2 * (width // 2)
    places = active + positions[:, None] * width + n[None, :]
    tl.store(places, result.to(active.dtype.element_ty), mask=kept[:, None] & n_kept[None, :])


@triton.jit
def _down(
    active,
    product,
    weights,
    slots,
    firsts,
    lasts,
    order,
    down,
    down_scale,
    depth,
    width,
    begin,
    stop,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    PER_BYTE: tl.constexpr,
    SORTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of columns [begin, stop), times each choice's weight, to where the choice stands."""
    num_tiles = tl.cdiv(stop - begin, COLUMNS)
    slot, first, last = _block(slots, firsts, lasts, tl.program_id(0) // num_tiles, SORTED)
    if first >= last:
        return
    positions = first + tl.arange(0, ROWS)
    kept = positions < last
    choices = positions
    if SORTED:
        choices = tl.load(order + positions, mask=kept, other=0)
    x_rows = active + positions * depth
    n = begin + tl.program_id(0) % num_tiles * COLUMNS + tl.arange(0, COLUMNS)
    n_kept = n < stop
    w_rows = down + (slot * width + n) * (depth // PER_BYTE)
    s_rows = (slot * tl.cdiv(width, SCALE_ROWS) + n // SCALE_ROWS) * tl.cdiv(depth, GROUP)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = depth // PER_BYTE
    SIZE: tl.constexpr = GROUP // PER_BYTE
    for step in range(tl.cdiv(depth, GROUP)):
        low = load_tile(x_rows, kept, step * SIZE, end, SIZE).to(DOT)
        high = low
        if PER_BYTE == 2:
            high = load_tile(x_rows + end, kept, step * SIZE, end, SIZE).to(DOT)
        codes = load_weights(w_rows, n_kept, step * SIZE, end, SIZE)
        scale = load_scales(down_scale + s_rows + step, n_kept, FORM)
        total = add_step(total, low, high, codes, scale, FORM, DOT)
    total *= tl.load(weights + choices, mask=kept, other=0)[:, None]
    places = product + choices[:, None] * (stop - begin) + (n - begin)[None, :]
    tl.store(places, total, mask=kept[:, None] & n_kept[None, :])


@triton.jit
def _sum(product, ids, out, hidden, begin, stop, top_k, COLUMNS: tl.constexpr):
    """One token's choices, in order; the places of those that are skipped were never written."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept = begin + n < stop
    places = out + token * hidden + begin + n
    total = tl.load(places, mask=kept)
    for k in range(top_k):
        choice = token * top_k + k
        end = tl.where(tl.load(ids + choice) >= 0, stop, begin)
        total += tl.load(product + choice * (stop - begin) + n, mask=begin + n < end, other=0)
    tl.store(places, total, mask=kept)
