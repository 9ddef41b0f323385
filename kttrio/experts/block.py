"""The MoE block of a layer: route, shared expert, routed experts, sum.

Where the routed experts live is not known here: anything with `forward(x, routing)` will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kttrio.experts.carry import Carry
from kttrio.experts.routing import Router, Routing
from kttrio.layers.mlp import GatedMLP

Listener = Callable[[Tensor], None]
"""Takes ids [tokens, top_k] int32."""

Shared = Literal["none", "plain", "gated"]
"""Whether a block has a shared expert, and whether a sigmoid gates it."""


Beside = Callable[[], Tensor]
"""What a block computes beside its routed experts: [tokens, hidden]."""


class Experts(Protocol):
    """The routed experts of one layer."""

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        beside: Beside | None = None,
        carry: Carry | None = None,
    ) -> Tensor:
        """Sum of the routed experts' outputs, weighted, and of what `beside` gives, which is asked
        while other hands work where that is possible; x and result [tokens, hidden].

        With a carry also what the layer before owes is added, and experts may be deferred."""
        ...

    def stream(
        self, x: Tensor, routing: Routing, out: Tensor, carry: Carry | None = None
    ) -> Iterator[None]:
        """The same for a whole long prompt, added to `out` [tokens, hidden] float32: each expert
        passes once, whatever the number of tokens. Other work may run wherever it yields."""
        ...


class MoEBlock(nn.Module):
    """Routed experts, and beside them perhaps a shared one that sees every token.

    `gates` holds the router's rows and, last, a gated shared expert's, in float32; `bias` is the
    router's, where it has one.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        router: Router,
        shared: Shared,
        shared_size: int,
        experts: Experts,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.gates = _float32(router.num_experts + (shared == "gated"), hidden_size)
        self.bias = _float32(router.num_experts) if router.has_bias else None
        self.listeners: list[Listener] = []
        """Hear of the experts that are chosen."""
        self.shared_is_gated = shared == "gated"
        self.shared = None
        if shared != "none":
            self.shared = GatedMLP(hidden_size, shared_size, dtype=dtype)

    def forward(self, x: Tensor, carry: Carry | None = None, live: Tensor | None = None) -> Tensor:
        """[tokens, hidden]; without a carry nothing is deferred. `live` [tokens] bool: tokens
        without it use no experts; None: all do."""
        scores = F.linear(x.float(), self.gates)
        routing = self._route(scores, live)
        beside = None if self.shared is None else partial(self._shared, self.shared, x, scores)
        return self.experts.forward(x, routing, beside, carry)

    def stream(
        self, x: Tensor, out: Tensor, *, piece: int, carry: Carry | None = None
    ) -> Iterator[None]:
        """The same for a long prompt, `piece` tokens at a time where routed experts have no part
        in it; x and `out` [tokens, hidden], `out` float32. Yields wherever other work may run."""
        routings = []
        for rows, part in zip(torch.split(out, piece), torch.split(x, piece), strict=True):
            scores = F.linear(part.float(), self.gates)
            routings.append(self._route(scores))
            if self.shared is None:
                rows.zero_()
            else:
                rows.copy_(self._shared(self.shared, part, scores))
            yield
        ids, weights = (torch.cat(tensors) for tensors in zip(*routings, strict=True))
        yield from self.experts.stream(x, Routing(ids, weights), out, carry)

    def _route(self, scores: Tensor, live: Tensor | None = None) -> Routing:
        routing = self.router.route(scores[:, : self.router.num_experts], self.bias)
        if live is not None:
            routing = routing.only(live)
        for listener in self.listeners:
            listener(routing.ids)
        return routing

    def _shared(self, shared: GatedMLP, x: Tensor, scores: Tensor) -> Tensor:
        out: Tensor = shared(x)
        return (out * scores[:, -1:].sigmoid()).to(x.dtype) if self.shared_is_gated else out


def _float32(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
