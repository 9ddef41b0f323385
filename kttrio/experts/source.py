"""Where a layer's experts come from: the checkpoint as it is, or quantised from it.

What was quantised is kept in a cache folder on disk, layer by layer, in the form that
`kttrio quant` writes; another start with the same checkpoint and method maps it. Without room for
that the experts are quantised at every start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from kttrio import native
from kttrio.config import ConfigError
from kttrio.experts.formats import ExpertPlan
from kttrio.weights.checkpoint import Checkpoint
from kttrio.weights.conversion import Conversion, Identity, NoRoomError
from kttrio.weights.fingerprint import fingerprint
from kttrio.weights.formats import base as formats
from kttrio.weights.formats.base import Packed
from kttrio.weights.loader import Countdown, ExpertWeights, Part, stored_bytes
from kttrio.weights.quantize import Quantised, quantise_all

log = logging.getLogger(__name__)


class _Named(TypedDict):
    """As the native library calls an expert's tensors."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_scale: Tensor | None
    up_scale: Tensor | None
    down_scale: Tensor | None


class Matrices(NamedTuple):
    """One expert, in the format its layer is held in."""

    gate: Packed
    up: Packed
    down: Packed

    def map(self, change: Callable[[Tensor], Tensor]) -> Matrices:
        """The same of what `change` makes of each tensor."""
        return Matrices(*(packed.map(change) for packed in self))

    def copy_(self, source: Matrices) -> None:
        """Take over another expert of the same format, bit for bit."""
        for matrix, other in zip(self, source, strict=True):
            matrix.copy_(other)

    def pack_into(self, layer: native.ExpertLayer, expert: int) -> None:
        """Let the layer copy this expert in."""
        layer.set_expert(expert, **self._named())

    def unpack_from(self, layer: native.ExpertLayer, expert: int) -> None:
        """Take over an expert that the layer holds, bit for bit as it was packed."""
        layer.get_expert(expert, **self._named())

    def _named(self) -> _Named:
        return {
            "gate": self.gate.data,
            "up": self.up.data,
            "down": self.down.data,
            "gate_scale": self.gate.scale,
            "up_scale": self.up.scale,
            "down_scale": self.down.scale,
        }


class ExpertSource(Protocol):
    """Gives every layer's experts, in order."""

    @property
    def nbytes(self) -> int:
        """What the countdown will have counted in the end."""
        ...

    def experts(self, layer: int, countdown: Countdown) -> Iterator[Matrices]:
        """The experts of a layer, from the first to the last."""
        ...


@contextmanager
def open_source(
    plan: ExpertPlan,
    checkpoint: Checkpoint,
    maps: Sequence[ExpertWeights],
    *,
    cache_dir: Path,
    threads: int,
) -> Iterator[ExpertSource]:
    """The source that the plan asks for; it holds the cache's lock until the context ends."""
    stored = StoredExperts(checkpoint, maps)
    if not plan.changed:
        yield stored
        return
    with ExitStack() as held:
        cache = _open_cache(plan, checkpoint, maps, cache_dir)
        if cache is not None:
            held.enter_context(cache)
        yield QuantisedExperts(plan, stored, cache, threads=threads)


class StoredExperts:
    """The checkpoint's own tensors. Float formats other than bfloat16 are rounded to it."""

    def __init__(self, checkpoint: Checkpoint, maps: Sequence[ExpertWeights]) -> None:
        self.checkpoint, self.maps = checkpoint, maps
        self._lossy = False

    @property
    def nbytes(self) -> int:
        return sum(self.layer_bytes(layer) for layer in range(len(self.maps)))

    def layer_bytes(self, layer: int) -> int:
        return stored_bytes(self.checkpoint, self.maps[layer].all_parts())

    def experts(self, layer: int, countdown: Countdown) -> Iterator[Matrices]:
        weights = self.maps[layer]
        for expert in range(weights.num_experts):
            parts = weights.parts(expert)
            yield Matrices(*(self._packed(part.name) for part in parts))
            countdown.add(stored_bytes(self.checkpoint, parts))
        self.checkpoint.release()

    def _packed(self, name: str) -> Packed:
        form = formats.find(formats.stored_format(self.checkpoint, name))
        packed = form.load(self.checkpoint, name)
        if packed.scale is not None or packed.data.dtype is torch.bfloat16:
            return packed
        rounded = form.quantize(packed.data, 0)
        if not self._lossy and not torch.equal(rounded.data.to(packed.data.dtype), packed.data):
            self._lossy = True
            log.warning(
                "experts stored as %s (first: %s) are rounded to bfloat16", packed.data.dtype, name
            )
        return rounded


class QuantisedExperts:
    """Layers that the plan changes are quantised on the way, the others come as stored.

    With a cache a layer is quantised into it unless it is there, and read from there.
    """

    def __init__(
        self, plan: ExpertPlan, stored: StoredExperts, cache: Conversion | None, *, threads: int
    ) -> None:
        self._plan, self._stored, self._threads = plan, stored, threads
        self._cache = cache

    @property
    def nbytes(self) -> int:
        return sum(self._layer_bytes(layer) for layer in range(len(self._stored.maps)))

    def experts(self, layer: int, countdown: Countdown) -> Iterator[Matrices]:
        if layer not in self._plan.changed:
            yield from self._stored.experts(layer, countdown)
            return
        place = self._plan.changed.index(layer)
        if self._cache is not None and place in self._cache.missing:
            self._fill_cache(self._cache, place, layer, countdown)
        if self._cache is not None:
            yield from self._cached(self._cache, place, layer, countdown)
        else:
            made = self._quantised(layer, countdown)
            yield from _by_expert(matrix.packed for matrix in made)
        self._stored.checkpoint.release()

    def _layer_bytes(self, layer: int) -> int:
        nbytes = self._stored.layer_bytes(layer)
        if layer not in self._plan.changed or self._cache is None:
            return nbytes
        place = self._plan.changed.index(layer)
        cached = self._cache.layer_bytes(place)
        return nbytes + cached if place in self._cache.missing else cached

    def _quantised(self, layer: int, countdown: Countdown) -> Iterator[Quantised]:
        checkpoint, parts = self._stored.checkpoint, self._stored.maps[layer].all_parts()
        target = self._plan.held[layer]
        for matrix in quantise_all(checkpoint, parts, target, threads=self._threads):
            yield matrix
            countdown.add(stored_bytes(checkpoint, [matrix.part]))

    def _fill_cache(self, cache: Conversion, place: int, layer: int, countdown: Countdown) -> None:
        try:
            cache.write(place, self._quantised(layer, countdown))
            if not cache.missing:
                cache.finish()
        except OSError as error:
            raise ConfigError(
                f"cannot keep quantised experts in {cache.directory}: {error.strerror}; make room "
                "there or name another folder with --kt-cache-dir"
            ) from error

    def _cached(
        self, cache: Conversion, place: int, layer: int, countdown: Countdown
    ) -> Iterator[Matrices]:
        with Checkpoint(cache.directory, [cache.path(place)]) as shard:
            yield from StoredExperts(shard, self._stored.maps).experts(layer, countdown)


def _by_expert(matrices: Iterable[Packed]) -> Iterator[Matrices]:
    in_order = iter(matrices)
    for gate, up, down in zip(in_order, in_order, in_order, strict=True):
        yield Matrices(gate, up, down)


def _open_cache(
    plan: ExpertPlan, checkpoint: Checkpoint, maps: Sequence[ExpertWeights], cache_dir: Path
) -> Conversion | None:
    """The cache of the layers that the plan changes; None, said aloud, where there can be none."""
    layers = [maps[layer] for layer in plan.changed]
    target = plan.held[plan.changed[0]]
    source = fingerprint(checkpoint, (part.name for part in _all_parts(layers)))
    kind = f"{target.form}-{target.group}-{len(layers)}"  # with drafts there is a layer more
    directory = cache_dir.expanduser() / f"experts-{kind}-{source[:16]}"
    try:
        with ExitStack() as undo:
            cache = Conversion(directory, Identity(source, target), layers, wait=True)
            undo.push(cache)
            cache.check_room()
            if not cache.missing:  # a start may have been ended between the last shard and this
                cache.finish()
            undo.pop_all()
    except (OSError, NoRoomError) as error:
        log.warning(
            "experts are quantised at every start, because they cannot be kept: %s "
            "(--kt-cache-dir)",
            error,
        )
        return None
    log.info("experts in %s are kept in %s", target.form, directory)
    return cache


def _all_parts(layers: Iterable[ExpertWeights]) -> Iterator[Part]:
    for weights in layers:
        yield from weights.all_parts()
