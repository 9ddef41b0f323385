"""The kernels compile at the sizes of real models, and fit into every chip they are for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need Triton: pip install triton")

SHARED_MEMORY = 99 << 10  # of consumer chips, per block; others have more
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_every_kernel_fits_into_a_consumer_chip(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.layers.triton.compiling"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {(kernel, chip) for _, kernel, chip, _ in launches}
    names = ("_decode", "_prefill", "_latent", "_sparse", "_join", "_gate_up", "_down", "_sum")
    names += ("_linear", "_solve", "_pass", "_recall")
    assert kernels == {(name, chip) for name in names for chip in (80, 90)}
    assert [launch for launch in launches if launch[3] > SHARED_MEMORY] == []
