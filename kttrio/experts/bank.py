"""The routed experts of a whole model: one thread pool, one format per layer, one owner.

Takes the experts into native memory and hands each layer its own; the blocks see only `Experts`.
Where they come from is told in source.py, in which format in formats.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kttrio import native
from kttrio.config import ConfigError, ExpertConfig
from kttrio.experts.block import Beside, Experts
from kttrio.experts.formats import Activation, ExpertPlan
from kttrio.experts.host import HostExperts
from kttrio.experts.routing import Routing
from kttrio.experts.source import ExpertSource
from kttrio.weights.loader import Countdown, ExpertWeights
from kttrio.weights.quantize import Target


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


class ExpertBank:
    """Owns the pool and every layer's experts until `close`."""

    def __init__(self, config: ExpertConfig, *, dtype: torch.dtype, limits: ExpertLimits) -> None:
        self._dtype = torch.float32 if dtype is torch.float32 else torch.bfloat16
        self._limits = limits
        self._pool = open_pool(config)
        self._layers: list[HostExperts] = []

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
        self,
        plan: ExpertPlan,
        maps: Sequence[ExpertWeights],
        source: ExpertSource,
        countdown: Countdown,
    ) -> None:
        """Take in the experts of all layers, in order."""
        for index, weights in enumerate(maps):
            layer = self._new_layer(weights, plan.held[index], plan.activations[index])
            self._layers.append(HostExperts(layer, dtype=self._dtype))
            for expert, matrices in enumerate(source.experts(index, countdown)):
                try:
                    matrices.pack_into(layer, expert)
                except native.NativeError as error:
                    gate = weights.gate.format(expert)  # tells the layer, too
                    raise native.NativeError(f"the expert of {gate!r}: {error}") from error

    def _new_layer(
        self, weights: ExpertWeights, held: Target, activation: Activation
    ) -> native.ExpertLayer:
        return native.ExpertLayer(
            self._pool,
            num_experts=weights.num_experts,
            hidden_size=weights.hidden_size,
            intermediate_size=weights.intermediate_size,
            weight_format=held.form,
            group_size=held.group,
            activation=activation,
            max_tokens=self._limits.max_tokens,
            max_top_k=self._limits.max_top_k,
        )

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

    def forward(self, x: Tensor, routing: Routing, beside: Beside | None = None) -> Tensor:
        raise RuntimeError("this model was built to be measured, not to run")

    def stream(self, x: Tensor, routing: Routing, out: Tensor) -> Iterator[None]:
        raise RuntimeError("this model was built to be measured, not to run")

    def close(self) -> None:
        """Nothing is held."""
