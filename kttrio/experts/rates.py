"""Measures what experts cost here and there on the loaded model; costs.py says what follows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from kttrio import native
from kttrio.experts.costs import Rates
from kttrio.experts.streamed import Ring
from kttrio.layers.grouped import grouped_mlp

_MOST_BYTES = 2**28  # of experts: more than a cache holds, and little to read
_MOST_EXPERTS = 64
_CHOICES = 16  # of an expert; with fewer its reading may hide them
_SECONDS = 0.1  # for each of five measurements, beside a first run
_MOST_RUNS = 5


def measure(
    ring: Ring, layer: native.ExpertLayer, experts: Sequence[int], *, dtype: torch.dtype
) -> Rates:
    """Let these experts of the layer, one at least, be computed by the host and by the device.

    They pass through the ring, which afterwards knows nothing of it. `dtype` is that of the rows.
    Takes less than a second, unless a GPU's kernels are built meanwhile.
    """
    nbytes = ring.slots.shape.nbytes
    some = experts[: max(1, min(_MOST_EXPERTS, _MOST_BYTES // nbytes))]
    sent = _seconds(lambda: _send(ring, layer, some)) / len(some)
    host = [_on_host(layer, some, times, dtype) for times in (1, _CHOICES)]
    device = [_on_device(ring, len(some), times, dtype) for times in (1, _CHOICES)]
    ring.forget()
    return Rates(*_line(*host), sent, *_line(*device))


def _send(ring: Ring, layer: native.ExpertLayer, experts: Sequence[int]) -> None:
    """Nothing is computed: copies alone, as many at a time as in a call."""
    x = torch.empty(0, layer.hidden_size, device=ring.device.where)
    for _ in ring.stream(layer, experts, x=x, parts=()):
        pass
    ring.device.synchronize()


def _on_host(
    layer: native.ExpertLayer, experts: Sequence[int], times: int, dtype: torch.dtype
) -> float:
    """Seconds of an expert that so many tokens chose."""
    ids = torch.tensor(experts, dtype=torch.int32).repeat_interleave(times).unsqueeze(1)
    x = torch.randn(len(ids), layer.hidden_size).to(dtype)
    out, weights = torch.empty_like(x), torch.ones(ids.shape)
    return _seconds(lambda: layer.forward(x, ids, weights, out)) / len(experts)


def _on_device(ring: Ring, num_experts: int, times: int, dtype: torch.dtype) -> float:
    """Seconds of an expert in a slot that so many tokens chose."""
    device, slots = ring.device, ring.slots
    hit = torch.tensor(ring.room[:num_experts], dtype=torch.int32, device=device.where)
    ids = hit.repeat_interleave(times).unsqueeze(1)
    x = torch.randn(len(ids), slots.shape.hidden_size).to(device.where, dtype)
    out, weights = torch.zeros_like(x, dtype=torch.float32), torch.ones_like(ids).float()

    def multiply() -> None:
        form = slots.shape.target.form
        grouped_mlp(x, ids, weights, slots.stacks, form=form, out=out)
        device.synchronize()

    return _seconds(multiply) / len(hit)


def _seconds(work: Callable[[], None]) -> float:
    """The shortest run of a few, after one that does not count."""
    work()
    runs: list[float] = []
    while len(runs) < _MOST_RUNS and sum(runs) < _SECONDS:
        begin = time.perf_counter()
        work()
        runs.append(time.perf_counter() - begin)
    return min(runs)


def _line(once: float, often: float) -> tuple[float, float]:
    """Seconds of an expert and of each of its choices, from those with one and with `_CHOICES`."""
    choice = max(often - once, 0) / (_CHOICES - 1)
    return max(once - choice, 0), choice


def describe(rates: Rates, nbytes: int) -> str:
    """For people; `nbytes` is an expert's size."""
    host, device = (
        f"{1e6 * expert:.0f} us on the {where} and {1e6 * choice:.1f} us for each token"
        for where, expert, choice in (
            ("host", rates.host_expert, rates.host_choice),
            ("device", rates.device_expert, rates.device_choice),
        )
    )
    speed = nbytes / rates.send_expert / 1e9
    return (
        f"an expert of {_size(nbytes)} takes {host}, {device}, and "
        f"{1e6 * rates.send_expert:.0f} us to get there ({speed:.1f} GB/s)"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"
