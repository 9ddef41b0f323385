"""What a server needs of memory, row by row, before it is divided: arithmetic, nothing allocated.

How much of each there is room for is memory.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kttrio.config import EngineConfig
from kttrio.experts.feeders import most_staging_bytes
from kttrio.experts.handoff import HandoffShape
from kttrio.experts.recorder import RecordedShape, RecorderSettings
from kttrio.layers.keys import MAX_KEYS
from kttrio.layers.triton.scratch import scratch_bytes
from kttrio.models.loading import Estimate
from kttrio.runner.graphs import GraphWish
from kttrio.runner.logprobs import BLOCK_ROWS
from kttrio.runner.passage import passage_bytes
from kttrio.runner.portion import Portion

# Float32 rows of hidden size, for each token of a step:
_STREAM_ROWS = 2  # what goes through the layers, and what comes out of one
_MLP_ROWS = 6  # what a router and the sums of experts take
_DECODE_ROWS = 24  # all that a captured step keeps
_LOGIT_COPIES = 3  # raw, changed, and what a reduction needs
_GRAPH_BYTES = 16 * 2**20  # of some thousand captured launches
_SCORED_BYTES = 48  # of a key that may be chosen: its place, its score, and what becomes of these
# Of a GPU: kernels, loaded when they first run, and what cuBLAS keeps for each of two streams.
_LIBRARY_BYTES = 192 * 2**20 + 2 * 32 * 2**20

OF_STEPS = (
    *("step scratch", "expert scratch", "host staging"),
    *("device staging", "device expert scratch"),
)
"""Rows that are smaller with shorter steps."""

OF_PROMPTS = ("expert ring", "long prompts", "device expert scratch")
"""Rows that are smaller where less is on its way through the device."""


class MemoryRow(NamedTuple):
    """One line of the table that `kttrio serve` prints."""

    name: str
    where: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Needs:
    """What there is to be room for."""

    estimate: Estimate
    engine: EngineConfig
    recording: RecorderSettings | None = None
    portion: Portion | None = None
    """None: all experts are the CPU's, and so is all the rest."""
    graphs: GraphWish | None = None
    """None: no step is captured."""

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        return () if self.graphs is None else self.graphs.fit(self._most_captured)

    @property
    def _most_captured(self) -> int:
        """Rows. Where keys are chosen a captured step scores as many as each row may ever have:
        with more of them than other steps gather, it would be the slower one."""
        slots = self.engine.max_running_requests
        if not self.estimate.cache_shape.bytes_chosen:
            return slots
        return max(min(slots, MAX_KEYS // self.context), 1)

    @property
    def context(self) -> int:
        """The longest sequence that was asked for, that the model was made for, and that there may
        be room for."""
        engine, made_for = self.engine, self.estimate.shape.context_length
        asked = min(engine.context_length or made_for, made_for)
        if engine.max_total_tokens is None:
            return asked
        return min(asked, pages_for(engine.max_total_tokens, engine) * engine.page_size)


def expert_rows(needs: Needs, num_resident: int, where: str) -> Iterator[MemoryRow]:
    """The routed experts, on both sides: those of the device have no copy on the host."""
    estimate, portion = needs.estimate, needs.portion
    smallest = min(estimate.slot_bytes, default=0)
    yield MemoryRow("experts", "cpu", estimate.expert_bytes - num_resident * smallest)
    if portion is not None:
        largest = max(estimate.slot_bytes)
        yield MemoryRow("device experts", where, num_resident * largest)
        yield from _row("swapped experts", where, portion.num_spare_slots * largest)
        yield from _row("expert ring", where, portion.num_ring_slots * largest)


def host_rows(needs: Needs) -> Iterator[MemoryRow]:
    """What stays with the host's experts."""
    scratch = needs.estimate.expert_scratch.nbytes(needs.engine.chunked_prefill_size)
    yield MemoryRow("expert scratch", "cpu", scratch)
    if needs.portion is not None:
        yield MemoryRow("host staging", "cpu", _staging_bytes(needs, needs.portion))
    if needs.recording is not None and needs.recording.num_steps is not None:
        shape = needs.estimate.shape
        recorded = RecordedShape(shape.num_layers, shape.num_experts, shape.top_k)
        longest = 0 if needs.portion is None else needs.portion.max_long_tokens
        tokens = max(needs.engine.chunked_prefill_size, longest)
        most = needs.recording.most_bytes(recorded, tokens)
        yield MemoryRow("expert recording", "cpu", most)


def device_rows(needs: Needs, where: str) -> Iterator[MemoryRow]:
    """What is where the dense layers are, but for experts and the KV cache."""
    estimate, engine, portion = needs.estimate, needs.engine, needs.portion
    states = engine.max_running_requests * estimate.cache_shape.bytes_per_slot
    yield MemoryRow("dense weights", where, estimate.dense_bytes)
    yield MemoryRow("recurrent states", where, states)
    yield MemoryRow("step scratch", where, _scratch_bytes(needs))
    yield from _row("decode graphs", where, _graph_bytes(needs))
    yield from _row("image scratch", where, engine.max_image_tokens * estimate.image_token_bytes)
    yield from _row("GPU libraries", where, 0 if where == "cpu" else _LIBRARY_BYTES)
    if portion is not None:
        yield MemoryRow("device staging", where, _handoff(needs, portion).device_bytes)
        yield MemoryRow(
            "device expert scratch", where, _device_scratch_bytes(needs, portion, where)
        )
        each = passage_bytes(
            estimate.shape,
            estimate.cache_shape,
            row_bytes=estimate.row_bytes,
            recorded=needs.recording is not None,
            deferred=portion.max_deferred > 0,
        )
        yield from _row("long prompts", where, portion.max_long_tokens * each)


def _device_scratch_bytes(needs: Needs, portion: Portion, where: str) -> int:
    """While the device computes experts, of a step or of a whole long prompt: what a GPU's kernels
    take; or in torch one expert in float32, at worst with all tokens, and their sum."""
    estimate = needs.estimate
    tokens = max(needs.engine.chunked_prefill_size, portion.max_long_tokens)
    hidden, wide = sizes = estimate.shape.hidden_size, estimate.intermediate_size
    if where != "cpu":
        itemsize = estimate.row_bytes // hidden
        return scratch_bytes(tokens, estimate.shape.top_k, sizes, itemsize)
    each = 3 * hidden + 3 * wide
    return (tokens * each + 3 * hidden * wide) * torch.float32.itemsize


def _graph_bytes(needs: Needs) -> int:
    """What captured steps keep: their inputs and what is computed on the way, the page and the slot
    that padding writes to, the keys that an indexer chooses from, and each graph itself."""
    if not needs.graph_sizes:
        return 0
    estimate, most = needs.estimate, needs.graph_sizes[-1]
    tables = most * pages_for(needs.context, needs.engine) * torch.int64.itemsize
    rows = most * estimate.shape.hidden_size * _DECODE_ROWS * torch.float32.itemsize
    spare = page_bytes(needs) + estimate.cache_shape.bytes_per_slot
    scored = 0
    if estimate.cache_shape.bytes_chosen:
        scored = most * needs.context * (estimate.cache_shape.bytes_gathered + _SCORED_BYTES)
    return tables + rows + spare + scored + len(needs.graph_sizes) * _GRAPH_BYTES


def page_bytes(needs: Needs) -> int:
    return needs.engine.page_size * needs.estimate.cache_shape.bytes_per_token


def pages_for(num_tokens: int, engine: EngineConfig) -> int:
    return -(-num_tokens // engine.page_size)


def _scratch_bytes(needs: Needs) -> int:
    """What the largest step needs beside its caches: rows, a layer's own, logits, the keys that
    attend together, penalty counts, and what is kept until drafts are verified."""
    estimate, engine, context = needs.estimate, needs.engine, needs.context
    shape, slots = estimate.shape, engine.max_running_requests
    verified = slots * (1 + shape.num_drafts)  # tokens that are drawn or compared with drafts
    tokens = engine.chunked_prefill_size
    row = tokens * shape.hidden_size * torch.float32.itemsize
    mixer = estimate.step_scratch.nbytes(tokens, context=context, num_sequences=slots)
    logits = max(verified, BLOCK_ROWS) * shape.vocab_size * _LOGIT_COPIES
    counts = slots * shape.vocab_size * (torch.float32.itemsize + torch.bool.itemsize)
    keys = min(slots * context, max(MAX_KEYS, context)) * estimate.cache_shape.bytes_gathered
    kept = verified * estimate.cache_shape.bytes_per_draft if shape.num_drafts else 0
    layer = _STREAM_ROWS * row + max(_MLP_ROWS * row, mixer)
    return layer + logits * torch.float32.itemsize + keys + counts + kept


def _staging_bytes(needs: Needs, portion: Portion) -> int:
    """Pinned buffers: what the host's experts take and give, and experts on their way."""
    largest = max(needs.estimate.slot_bytes)
    swapped = 2 * portion.num_spare_slots * largest  # one comes and one goes
    ring = most_staging_bytes(largest, portion.num_ring_slots) if portion.num_ring_slots else 0
    return _handoff(needs, portion).host_bytes + swapped + ring


def _handoff(needs: Needs, portion: Portion) -> HandoffShape:
    shape, row_bytes = needs.estimate.shape, needs.estimate.row_bytes
    wide = row_bytes == shape.hidden_size * torch.float32.itemsize
    return HandoffShape(
        needs.engine.chunked_prefill_size,
        shape.top_k,
        shape.hidden_size,
        dtype=torch.float32 if wide else torch.bfloat16,
        defers=portion.max_deferred > 0,
    )


def _row(name: str, where: str, num_bytes: int) -> Iterator[MemoryRow]:
    """Where there is something to be said."""
    if num_bytes:
        yield MemoryRow(name, where, num_bytes)


def total(rows: Iterable[MemoryRow]) -> int:
    return sum(row.num_bytes for row in rows)


def format_bytes(num_bytes: int) -> str:
    """1536 -> '1.5 KiB'"""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
