"""The memory plan's arithmetic against what the library really takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kttrio import native
from kttrio.config import ExpertConfig
from kttrio.experts.scratch import MOST_PRODUCT_BYTES, ScratchShape, most_parts, scratch_shape
from kttrio.weights.loader import ExpertWeights

WEIGHTS = ExpertWeights("g.{}", "u.{}", "d.{}", 2, hidden_size=2048, intermediate_size=512)
TOKENS, TOP_K = 2048, 8
ROUNDING = 64 * 2**20  # a dozen buffers lie on 2M pages, for each worker one


def address_space() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))


def taken(activation: str, parts: int) -> int:
    """Address space that a layer for TOKENS takes beyond one for a single token."""
    sizes = []
    for max_tokens in (1, TOKENS):
        with native.Pool(threads=parts, parts=parts) as pool:
            before = address_space()
            layer = native.ExpertLayer(
                pool,
                num_experts=WEIGHTS.num_experts,
                hidden_size=WEIGHTS.hidden_size,
                intermediate_size=WEIGHTS.intermediate_size,
                weight_format="int4",
                group_size=64,
                activation=activation,
                max_tokens=max_tokens,
                max_top_k=TOP_K,
            )
            sizes.append(address_space() - before)
            layer.close()
    return sizes[1] - sizes[0]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("activation", ["float32", "bfloat16", "int8"])
def test_the_library_takes_no_more_than_is_planned(activation: str, parts: int) -> None:
    shape = scratch_shape([WEIGHTS], [activation], top_k=TOP_K, num_parts=parts)
    planned, found = shape.nbytes(TOKENS), taken(activation, parts)
    assert found <= planned + ROUNDING
    assert planned <= 2 * found + ROUNDING  # only tiles want rows sorted by expert


def test_layers_share_the_largest_need() -> None:
    small = ExpertWeights("g.{}", "u.{}", "d.{}", 2, hidden_size=64, intermediate_size=32)
    both = scratch_shape([small, WEIGHTS], ["float32"] * 2, top_k=TOP_K, num_parts=1)
    assert both == scratch_shape([WEIGHTS], ["float32"], top_k=TOP_K, num_parts=1)


def test_products_are_bounded_for_each_part() -> None:
    shape = ScratchShape(token_bytes=0, product_bytes=2**20, num_parts=2)
    assert shape.nbytes(3) == 6 * 2**20
    assert shape.nbytes(10**6) == 2 * MOST_PRODUCT_BYTES


def test_parts_are_those_of_the_flags_or_the_machine(tmp_path: Path) -> None:
    for name in ("node0", "node1", "online"):
        (tmp_path / name).mkdir()
    assert most_parts(ExpertConfig(), tmp_path) == 2
    assert most_parts(ExpertConfig(), tmp_path / "none") == 1
    assert most_parts(ExpertConfig(kt_threadpool_count=3), tmp_path) == 3
    assert most_parts(ExpertConfig(kt_numa_nodes=(0, 0, 1, 1)), tmp_path) == 4
