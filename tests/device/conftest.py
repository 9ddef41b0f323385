"""A layer of experts whose jobs streams can start."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from kttrio.native import ExpertLayer, Pool
from tests.native.expert_reference import (
    BF16,
    make_layer,
    random_experts,
    random_input,
    random_routing,
)

TOKENS, HIDDEN = 12, 64

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


@pytest.fixture
def layer() -> Iterator[ExpertLayer]:
    experts = random_experts(3, HIDDEN, 96, kind=BF16, seed=1)
    with Pool(threads=2) as pool, make_layer(pool, experts, activation="float32") as made:
        yield made


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, weights = random_routing(TOKENS, 2, 3, seed=2)
    return random_input(TOKENS, HIDDEN, seed=3, dtype=torch.float32), ids, weights
