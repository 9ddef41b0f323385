from __future__ import annotations

import pytest
import torch

from kttrio.config import ExpertConfig
from kttrio.runner.fitting import choose_dtype, fit_pool


@pytest.mark.parametrize(
    ("flags", "given", "notes"),
    [
        ({}, {}, []),
        ({"kt_cpuinfer": 8}, {"kt_cpuinfer": 8}, []),
        (
            {"kt_cpuinfer": 96},
            {},
            ["--kt-cpuinfer 96 is reduced to one for each core: we may use 8 processors"],
        ),
        ({"kt_threadpool_count": 2}, {"kt_threadpool_count": 2}, []),
        (
            {"kt_threadpool_count": 8},
            {"kt_threadpool_count": 2},
            ["--kt-threadpool-count 8 is reduced to 2: a pool for each NUMA node we may use"],
        ),
        (
            {"kt_numa_nodes": (0, 1, 2), "kt_threadpool_count": 3},
            {"kt_numa_nodes": (0, 2)},
            ["--kt-numa-nodes 0,1,2 is reduced to 0,2"],
        ),
        ({"kt_numa_nodes": (0, 0)}, {"kt_numa_nodes": (0, 0)}, []),
    ],
)
def test_threads_and_pools_that_the_machine_lacks_are_left_out(caplog, flags, given, notes):
    found = fit_pool(ExpertConfig(**flags), num_cores=8, nodes=[0, 2])
    assert found == ExpertConfig(**given)
    assert [record.message for record in caplog.records] == notes


@pytest.mark.parametrize(
    "flags",
    [{"kt_numa_nodes": (5,)}, {"kt_numa_nodes": (0, 5), "kt_threadpool_count": 1}],
    ids=["no node is left", "flags that disagree"],
)
def test_what_the_pool_must_refuse_stays(flags):
    assert fit_pool(ExpertConfig(**flags), num_cores=8, nodes=[0, 2]) == ExpertConfig(**flags)


@pytest.mark.parametrize(
    ("wanted", "stored", "fast", "chosen"),
    [
        ("auto", {"dtype": "bfloat16"}, True, torch.bfloat16),
        ("auto", {"torch_dtype": "bfloat16"}, True, torch.bfloat16),
        ("auto", {"dtype": "bfloat16"}, False, torch.float32),
        ("auto", {"dtype": "float16"}, True, torch.float32),
        ("auto", {"dtype": "float32"}, True, torch.float32),
        ("auto", {}, True, torch.bfloat16),
        ("float32", {"dtype": "bfloat16"}, True, torch.float32),
        ("bfloat16", {"dtype": "float32"}, False, torch.bfloat16),
    ],
)
def test_the_precision(wanted, stored, fast, chosen):
    assert choose_dtype(wanted, stored, fast_bfloat16=fast) is chosen


def test_leaving_the_stored_precision_is_logged(caplog):
    with caplog.at_level("INFO"):
        choose_dtype("auto", {"dtype": "bfloat16"}, fast_bfloat16=False)
    assert "bfloat16" in caplog.text
    assert "float32" in caplog.text
