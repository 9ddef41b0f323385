"""Compares loaded experts with the checkpoint's own tensors, once, before anybody is served.

A few experts of one layer are computed on every way that steps take, and by plain products in
float32. What is wrong with a kernel, a copy or a table of this machine is then found at the start,
not in an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kttrio.experts.bank import ExpertBank
from kttrio.experts.formats import Activation, ExpertPlan
from kttrio.experts.routing import Routing
from kttrio.experts.slots import NOWHERE
from kttrio.weights.checkpoint import Checkpoint
from kttrio.weights.formats import base as formats
from kttrio.weights.formats.base import PLAIN
from kttrio.weights.loader import ExpertWeights
from kttrio.weights.quantize import Target, quantise

# Of an output, root mean square. What lies between an expert's matrices is rounded to the
# activation, and the result to the model's dtype: half a unit in the last of 8 bits is 2^-9, for
# each of both and for the shared way back. int8 has a scale for each group of values, about three
# times coarser than its largest. An expert in another's place differs by more than half.
TOLERANCES: dict[Activation, float] = {"float32": 1e-4, "bfloat16": 1.5e-2, "int8": 6e-2}

_NUM_EXPERTS = 2  # of each side
_NUM_TOKENS = 8
_SEED = 7


class ExpertsDiffer(RuntimeError):
    """What was loaded does not compute what the checkpoint says."""


class Checked(NamedTuple):
    """Where a bank's experts come from."""

    checkpoint: Checkpoint
    maps: Sequence[ExpertWeights]
    plan: ExpertPlan
    top_k: int
    dtype: torch.dtype
    """Of the model."""


class _Way(NamedTuple):
    """Experts that are computed alike."""

    name: str
    experts: list[int]
    streamed: bool = False


class _Truth(NamedTuple):
    """What some experts of a layer give for the same tokens, by the checkpoint."""

    x: Tensor  # [tokens, hidden]
    outputs: dict[int, Tensor]  # by expert: [tokens, hidden] float32

    def of(self, ids: Tensor) -> Tensor:
        """The weighted sum of a token's choices: ids [tokens, top_k], -1 for none."""
        total, weights = torch.zeros(self.x.shape), _weights(ids.shape[1])
        for expert, output in self.outputs.items():
            total += weights.where(ids == expert, 0).sum(1, keepdim=True) * output
        return total


def check_experts(bank: ExpertBank, checked: Checked) -> None:
    """Raises ExpertsDiffer, naming the layer, the way and by how much. Takes little time."""
    layer = _choose_layer(bank)
    activation = checked.plan.activations[layer]
    ways = list(_ways(bank, layer))
    truth = _read(checked, layer, {expert for way in ways for expert in way.experts})
    for way in ways:
        error = _error(bank, layer, way, truth, top_k=checked.top_k)
        if not error <= TOLERANCES[activation]:
            first = checked.maps[layer].gate.format(way.experts[0])
            raise ExpertsDiffer(
                f"self-check: experts {way.name} give something else than the checkpoint's tensors "
                f"({first!r} and others): off by {error:.1%}, where {activation} products are off "
                f"by {TOLERANCES[activation]:.1%} at most; answers would be wrong. Try --kt-isa "
                "avx2 or --device cpu, and report this with the line above"
            )


def _choose_layer(bank: ExpertBank) -> int:
    """The first with experts on both sides; else one with some on the device; else the first."""
    if bank.sides is None:
        return 0
    numbers = [table.num_resident for table in bank.sides.residencies]
    both = [i for i, table in enumerate(bank.sides.residencies) if 0 < numbers[i] < len(table.mask)]
    some = [i for i, number in enumerate(numbers) if number]
    return (both or some or [0])[0]


def _ways(bank: ExpertBank, layer: int) -> Iterator[_Way]:
    if bank.sides is None:
        yield _Way("on the host", _spread(torch.arange(bank.host_layers[layer].num_experts)))
        return
    mask = bank.sides.residencies[layer].mask
    resident, others = (_spread(who.nonzero().flatten()) for who in (mask, ~mask))
    if resident:
        yield _Way("on the device", resident)
    if others:
        yield _Way("on the host", others)
        yield _Way("in long prompts", others, streamed=True)
    if resident and others:
        yield _Way("on both sides", [*resident, *others])


def _spread(ids: Tensor) -> list[int]:
    """A few, from the first to the last."""
    if not len(ids):
        return []
    places = torch.linspace(0, len(ids) - 1, min(_NUM_EXPERTS, len(ids))).long()
    return [int(expert) for expert in ids[places]]


def _read(checked: Checked, layer: int, experts: Iterable[int]) -> _Truth:
    weights, held = checked.maps[layer], checked.plan.held[layer]
    random = torch.Generator().manual_seed(_SEED)
    x = torch.randn(_NUM_TOKENS, weights.hidden_size, generator=random).to(checked.dtype)
    rows, outputs = x.float(), {}
    for expert in sorted(experts):
        gate, up, down = _matrices(checked.checkpoint, weights, held, expert)
        outputs[expert] = (F.silu(rows @ gate.T) * (rows @ up.T)) @ down.T
    return _Truth(x, outputs)


def _error(bank: ExpertBank, layer: int, way: _Way, truth: _Truth, *, top_k: int) -> float:
    """Root mean square of the difference, over that of the truth; the worst token's."""
    ids = _choices(way.experts, top_k)
    expected = truth.of(ids)
    found = _compute(bank, layer, truth.x, ids, streamed=way.streamed)
    norms = torch.linalg.vector_norm(expected, dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return float((torch.linalg.vector_norm(found - expected, dim=1) / norms).max())


def _choices(experts: list[int], top_k: int) -> Tensor:
    """[tokens, top_k] int32: each token has the next ones, and -1 where there are too few."""
    ids = torch.full((_NUM_TOKENS, top_k), NOWHERE, dtype=torch.int32)
    for token in range(_NUM_TOKENS):
        for place in range(min(top_k, len(experts))):
            ids[token, place] = experts[(token + place) % len(experts)]
    return ids


def _weights(top_k: int) -> Tensor:
    """Of a token's choices, [top_k]: no two alike, or one could stand in another's place."""
    falling = torch.arange(top_k, 0, -1, dtype=torch.float32)
    return falling / falling.sum()


def _compute(bank: ExpertBank, layer: int, x: Tensor, ids: Tensor, *, streamed: bool) -> Tensor:
    """What was chosen, as a step or a long prompt has it: [tokens, hidden] float32."""
    experts, sides = bank.layers[layer], bank.sides
    where = torch.device("cpu") if sides is None else sides.division.device.where
    weights = _weights(ids.shape[1]).expand(ids.shape).contiguous()
    routing = Routing(ids.to(where), weights.to(where))
    if streamed:
        out = torch.zeros(x.shape, dtype=torch.float32, device=where)
        for _ in experts.stream(x.to(where), routing, out):
            pass
    else:
        out = experts.forward(x.to(where), routing)
    if sides is not None:
        sides.division.device.synchronize()
    return out.float().cpu()


def _matrices(
    checkpoint: Checkpoint, weights: ExpertWeights, held: Target, expert: int
) -> list[Tensor]:
    """gate, up and down as they should be held, in float32."""
    form = formats.find(held.form)
    found = (quantise(checkpoint, part, held).packed for part in weights.parts(expert))
    plain = (form.dequantize(packed, torch.float32) for packed in found)
    return [each.bfloat16().float() if held.form == PLAIN else each for each in plain]
