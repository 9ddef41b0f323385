"""The first steps, before anybody is served.

On a GPU kernels are compiled for each way in which a step may be computed, and libraries allocate
what they keep, when they first run: here, and not in somebody's answer. So what this GPU cannot run
is known before the port opens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from kttrio.config import ConfigError
from kttrio.device.base import Device
from kttrio.layers.cache import LayerCache
from kttrio.plan import Capacity, Chunk, StepPlan
from kttrio.request import SamplingParams
from kttrio.runner.runner import Runner, StepModel

log = logging.getLogger(__name__)

# Tokens of a prompt. Kernels take other tiles for more of them; beyond the last, no more others.
_LENGTHS = (2, 100, 600, 2048)
_SAMPLINGS = (
    SamplingParams(max_tokens=2, seed=0, temperature=0.0, logprobs=1),
    SamplingParams(max_tokens=2, seed=0, top_p=0.9, presence_penalty=0.1),
)


class _AllTokens:
    """A mask that lets each of them come."""

    def __init__(self, vocab_size: int) -> None:
        self._masks = (b"\xff" * -(-vocab_size // 8),)

    def wait(self) -> tuple[bytes]:
        return self._masks


def warm_up(
    model: StepModel, caches: list[LayerCache], *, capacity: Capacity, device: Device
) -> None:
    """A few prompts, and a token after each, drawn under a mask. ConfigError where one fails.

    No sequence may be there yet, and nobody who listens to the experts that are chosen.
    """
    begun = time.perf_counter()
    plain = replace(capacity, num_drafts=0, long_tokens=0, max_long_tokens=0)
    runner = Runner(model, caches, capacity=plain, device=device.where, seam=device)
    try:
        for plan in _plans(capacity):
            runner.step(plan)
        with torch.inference_mode():
            device.synchronize()
    except Exception as error:
        raise ConfigError(
            f"the first steps failed on {device.where}: {error}; with --device cpu the CPU does "
            "everything"
        ) from error
    log.info("the first steps took %.1f s", time.perf_counter() - begun)


def _plans(capacity: Capacity) -> Iterator[StepPlan]:
    room = min(capacity.context_length, capacity.num_pages * capacity.page_size) - 1
    lengths = sorted({min(length, capacity.max_step_tokens, room) for length in _LENGTHS})
    for length in lengths:
        for sampling in _SAMPLINGS:
            yield from _sequence(length, sampling, capacity)


def _sequence(length: int, sampling: SamplingParams, capacity: Capacity) -> Iterator[StepPlan]:
    pages = tuple(range(-(-(length + 1) // capacity.page_size)))
    # Different ids, or all tokens would choose the same experts.
    ids = tuple(token % capacity.vocab_size for token in range(length))
    prompt = Chunk(0, 0, ids, pages, sampling, sample=True, num_prompt_tokens=length)
    yield StepPlan((prompt,))
    masks = _AllTokens(capacity.vocab_size)
    yield StepPlan((prompt._replace(start=length, token_ids=ids[-1:], masks=masks),))
