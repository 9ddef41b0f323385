"""The first steps: of every size that kernels know, on whole models, and told where they fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kttrio.config import ConfigError
from kttrio.device.host import HostDevice
from kttrio.runner.warmup import warm_up
from tests.apart import ApartDevice, watched
from tests.divided import divide, load_divided
from tests.golden import FIXTURES
from tests.runner.toy import CAPACITY, PAGE_SIZE, ToyModel


class Heard(ToyModel):
    """Hears of its batches; `breaks_at` is a length that it cannot do."""

    def __init__(self, breaks_at=0):
        super().__init__()
        self.lengths, self._breaks_at = [], breaks_at

    def forward(self, batch, caches):
        self.lengths.append(batch.num_tokens)
        if batch.num_tokens == self._breaks_at:
            raise RuntimeError("out of shared memory")
        return super().forward(replace(batch, token_ids=batch.token_ids % 90), caches)


def warm(model, **changes):
    capacity = replace(CAPACITY, **changes)
    caches = model.new_caches(
        num_pages=capacity.num_pages, page_size=PAGE_SIZE, num_slots=capacity.num_slots
    )
    warm_up(model, caches, capacity=capacity, device=HostDevice())


LARGE = {"context_length": 4000, "num_pages": 1000}


@pytest.mark.parametrize(
    ("limits", "lengths"),
    [
        (LARGE | {"max_step_tokens": 8192}, [2, 100, 600, 2048]),
        (LARGE | {"max_step_tokens": 512}, [2, 100, 512]),
        ({"context_length": 64}, [2, 63]),
        ({"context_length": 4000, "num_pages": 3}, [2, 11]),
        ({"max_step_tokens": 1}, [1]),
    ],
)
def test_prompts_are_as_long_as_they_may_be(limits, lengths):
    model = Heard()
    warm(model, **limits)
    assert model.lengths == [each for length in lengths for each in (length, 1) * 2]


def test_what_fails_is_told():
    with pytest.raises(ConfigError, match="failed on cpu: out of shared memory; with --device cpu"):
        warm(Heard(breaks_at=63))


def test_a_whole_model_is_warmed_up_where_it_is():
    name, device = FIXTURES / "qwen3_next", ApartDevice()
    with watched():
        model = load_divided(name, divide(name, 0.5, device=device, num_ring_slots=4))
        caches = model.new_caches(num_pages=40, page_size=PAGE_SIZE, num_slots=2)
        for cache in (cache for cache in caches if hasattr(cache, "key")):
            cache.key.fill_(torch.nan)
        capacity = replace(CAPACITY, num_slots=2, num_pages=40, vocab_size=model.vocab_size)
        warm_up(model, caches, capacity=capacity, device=device)
        first = caches[-1].key[0].cpu()
        model.close()
    assert first.isfinite().all()
