"""The routed experts of a whole model: one thread pool, one format per layer, one owner.

Takes the experts into native memory and hands each layer its own; the blocks see only `Experts`.
Where they come from is told in source.py, in which format in formats.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kttrio import native
from kttrio.config import ConfigError, ExpertConfig
from kttrio.experts.block import Beside, Experts
from kttrio.experts.carry import Carry
from kttrio.experts.division import Division
from kttrio.experts.formats import Activation, ExpertPlan
from kttrio.experts.handoff import HandoffShape
from kttrio.experts.host import HostExperts
from kttrio.experts.routing import Routing
from kttrio.experts.sides import Sides
from kttrio.experts.source import ExpertSource, Matrices
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

    @property
    def facts(self) -> Mapping[str, str]:
        """What was found out about the experts, for people."""
        ...

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
    """Owns the pool and every layer's experts until `close`.

    Without a division all of them are on the host. With one, those that begin on the device go
    from the checkpoint straight into their slots: no expert is in memory twice.
    """

    def __init__(
        self,
        config: ExpertConfig,
        *,
        dtype: torch.dtype,
        limits: ExpertLimits,
        division: Division | None = None,
    ) -> None:
        self._dtype = torch.float32 if dtype is torch.float32 else torch.bfloat16
        self._limits, self._division = limits, division
        self._pool = open_pool(config)
        self._layers: list[Experts] = []
        self.host_layers: list[native.ExpertLayer] = []
        """What the library holds of each layer."""
        self.sides: Sides | None = None
        """Slots, tables and buffers of the division, once it is loaded."""

    @property
    def layers(self) -> Sequence[Experts]:
        return self._layers

    @property
    def nbytes(self) -> int:
        """Of the experts on both sides; free slots count, as they are taken."""
        return self.host_bytes + self.device_bytes

    @property
    def host_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.host_layers)

    @property
    def device_bytes(self) -> int:
        slots = None if self.sides is None else self.sides.slots
        return 0 if slots is None else slots.nbytes

    @property
    def isa(self) -> str:
        return self._pool.isa

    @property
    def num_threads(self) -> int:
        return self._pool.num_threads

    @property
    def facts(self) -> Mapping[str, str]:
        return {} if self.sides is None else self.sides.facts

    def load(
        self,
        plan: ExpertPlan,
        maps: Sequence[ExpertWeights],
        source: ExpertSource,
        countdown: Countdown,
    ) -> None:
        """Take in the experts of all layers, in order.

        ConfigError for a division that the layers' formats do not allow.
        """
        if self._division is not None:
            handoff = self._handoff_shape(self._division, maps)
            threads = self._pool.num_threads
            self.sides = Sides(self._division, plan, maps, handoff, pool_threads=threads)
        for index, weights in enumerate(maps):
            layer = self._new_layer(weights, plan.held[index], plan.activations[index])
            self.host_layers.append(layer)
            for expert, matrices in enumerate(source.experts(index, countdown)):
                try:
                    self._take(index, expert, matrices)
                except (native.NativeError, ValueError) as error:
                    gate = weights.gate.format(expert)  # tells the layer, too
                    raise native.NativeError(f"the expert of {gate!r}: {error}") from error
            self._layers.append(self._join(index, layer))
        if self.sides is not None:
            self.sides.measure(self.host_layers, self._dtype)

    def _take(self, index: int, expert: int, matrices: Matrices) -> None:
        if self.sides is None or not self.sides.take(index, expert, matrices):
            matrices.pack_into(self.host_layers[index], expert)

    def _join(self, index: int, layer: native.ExpertLayer) -> Experts:
        if self.sides is None:
            return HostExperts(layer, dtype=self._dtype)
        return self.sides.join(index, layer)

    def _handoff_shape(self, division: Division, maps: Sequence[ExpertWeights]) -> HandoffShape:
        return HandoffShape(
            *self._limits,
            hidden_size=maps[0].hidden_size,
            dtype=self._dtype,
            defers=division.max_deferred > 0,
        )

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
        self._layers.clear()
        if self.sides is not None:
            self.sides.close()
            # A stream may still have a job before it, and what went wrong is nobody's any more.
            with suppress(Exception):
                self.sides.division.device.synchronize()
        for layer in self.host_layers:
            layer.close()
        self.host_layers.clear()
        self.sides = None
        self._pool.close()


class Unloaded:
    """The bank of a model that is only measured: no memory, no threads."""

    isa, nbytes, num_threads = "", 0, 0

    def __init__(self, num_layers: int) -> None:
        self.layers = [self] * num_layers
        self.facts: Mapping[str, str] = {}

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        beside: Beside | None = None,
        carry: Carry | None = None,
    ) -> Tensor:
        raise RuntimeError("this model was built to be measured, not to run")

    def stream(
        self, x: Tensor, routing: Routing, out: Tensor, carry: Carry | None = None
    ) -> Iterator[None]:
        raise RuntimeError("this model was built to be measured, not to run")

    def close(self) -> None:
        """Nothing is held."""
