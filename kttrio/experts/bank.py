"""The routed experts of a whole model: one thread pool, one format per layer, one owner.

Reads the experts from a checkpoint into native memory and hands each layer its own. Placement on
a device will be decided here as well; the blocks see only `Experts`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from kttrio import native
from kttrio.config import ConfigError, ExpertConfig
from kttrio.experts.block import Experts
from kttrio.experts.host import HostExperts
from kttrio.experts.routing import Routing
from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.formats import base as formats
from kttrio.weights.formats.base import Packed
from kttrio.weights.loader import Countdown, ExpertWeights, check_parts

log = logging.getLogger(__name__)


class Bank(Protocol):
    """What a model needs of its experts."""

    @property
    def layers(self) -> Sequence[Experts]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def isa(self) -> str: ...

    @property
    def num_threads(self) -> int: ...

    def count_activations(self) -> Tensor: ...

    def close(self) -> None: ...


class ExpertLimits(NamedTuple):
    """The largest call a layer must be ready for."""

    max_tokens: int
    max_top_k: int


def open_pool(config: ExpertConfig) -> native.Pool:
    """The worker threads that the flags describe; ConfigError where the flags disagree."""
    nodes, count = config.kt_numa_nodes, config.kt_threadpool_count
    if nodes and count is not None and len(nodes) != count:
        raise ConfigError(
            f"--kt-numa-nodes names {len(nodes)} nodes but --kt-threadpool-count is {count}: "
            "give one of them, or as many nodes as pools"
        )
    return native.Pool(
        threads=config.kt_cpuinfer, nodes=nodes or None, parts=count, isa=config.kt_isa
    )


def check_experts(checkpoint: Checkpoint, weights: ExpertWeights) -> str:
    """The format of a layer's experts; CheckpointError where tensors are wrong or formats mix."""
    check_parts(checkpoint, weights.all_parts())
    form = formats.stored_format(checkpoint, weights.gate.format(0))
    for part in weights.all_parts():
        other = formats.stored_format(checkpoint, part.name)
        if other != form:
            raise CheckpointError(
                f"tensor {part.name!r} in {checkpoint.entry(part.name).file} is {other}, but "
                f"{weights.gate.format(0)!r} is {form}: a layer's experts share one format"
            )
    return form


class ExpertBank:
    """Owns the pool and every layer's experts until `close`."""

    def __init__(self, config: ExpertConfig, *, dtype: torch.dtype, limits: ExpertLimits) -> None:
        self._activation = torch.float32 if dtype is torch.float32 else torch.bfloat16
        self._limits = limits
        self._pool = open_pool(config)
        self._layers: list[HostExperts] = []
        self._lossy = False

    @property
    def layers(self) -> Sequence[HostExperts]:
        return self._layers

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers)

    @property
    def isa(self) -> str:
        return self._pool.isa

    @property
    def num_threads(self) -> int:
        return self._pool.num_threads

    def load(
        self, checkpoint: Checkpoint, maps: Iterable[ExpertWeights], countdown: Countdown
    ) -> None:
        """Read the experts of all layers, in order; `check_experts` has passed before."""
        for weights in maps:
            form = formats.stored_format(checkpoint, weights.gate.format(0))
            layer = native.ExpertLayer(
                self._pool,
                num_experts=weights.num_experts,
                hidden_size=weights.hidden_size,
                intermediate_size=weights.intermediate_size,
                weight_format=cast("Literal['bf16', 'fp8']", form),  # checked by the library
                activation="float32" if self._activation is torch.float32 else "bfloat16",
                max_tokens=self._limits.max_tokens,
                max_top_k=self._limits.max_top_k,
            )
            self._layers.append(
                HostExperts(layer, num_experts=weights.num_experts, dtype=self._activation)
            )
            for expert in range(weights.num_experts):
                self._set_expert(layer, expert, checkpoint, weights)
                parts = weights.parts(expert)
                countdown.add(sum(checkpoint.entry(part.name).nbytes for part in parts))

    def _set_expert(
        self,
        layer: native.ExpertLayer,
        expert: int,
        checkpoint: Checkpoint,
        weights: ExpertWeights,
    ) -> None:
        gate, up, down = (self._packed(checkpoint, part.name) for part in weights.parts(expert))
        layer.set_expert(
            expert,
            gate=gate.data,
            up=up.data,
            down=down.data,
            gate_scale=gate.scale,
            up_scale=up.scale,
            down_scale=down.scale,
        )

    def _packed(self, checkpoint: Checkpoint, name: str) -> Packed:
        form = formats.find(formats.stored_format(checkpoint, name))
        packed = form.load(checkpoint, name)
        if packed.scale is not None or packed.data.dtype is torch.bfloat16:
            return packed
        rounded = form.quantize(packed.data)
        if not self._lossy and not torch.equal(rounded.data.to(packed.data.dtype), packed.data):
            self._lossy = True
            log.warning(
                "experts stored as %s (first: %s) are rounded to bfloat16", packed.data.dtype, name
            )
        return rounded

    def count_activations(self) -> Tensor:
        """From now on count how often each expert is chosen, into the tensor that is returned.

        [layers, experts] int64; it goes on counting, and asking again begins from zero.
        """
        num_experts = self._layers[0].num_experts if self._layers else 0
        counts = torch.zeros(len(self._layers), num_experts, dtype=torch.int64)
        for layer, row in zip(self._layers, counts, strict=True):
            layer.counts = row
        return counts

    def close(self) -> None:
        """Free the experts and end the threads; the model must not run any more."""
        for layer in self._layers:
            layer.close()
        self._layers.clear()
        self._pool.close()


class Unloaded:
    """The bank of a model that is only measured: no memory, no threads."""

    isa, nbytes, num_threads = "", 0, 0

    def __init__(self, num_layers: int) -> None:
        self.layers = [self] * num_layers

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        raise RuntimeError("this model was built to be measured, not to run")

    def count_activations(self) -> Tensor:
        return torch.zeros(len(self.layers), 0, dtype=torch.int64)

    def close(self) -> None:
        """Nothing is held."""
