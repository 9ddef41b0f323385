from __future__ import annotations

import subprocess
import sys

import pytest

from kttrio.layers.kernels import open_kernels

LAZY = """
import sys
from kttrio.models import loading
from kttrio.layers.kernels import open_kernels
assert open_kernels("torch") is None
assert "triton" not in sys.modules
"""


def test_torch_has_none():
    assert open_kernels("torch") is None


def test_triton_has_all():
    pytest.importorskip("triton", reason="kernels need Triton: pip install triton")
    kernels = open_kernels("triton")
    for name in ("decode", "prefill", "latent", "sparse"):
        assert callable(getattr(kernels, name))


def test_triton_is_imported_only_where_it_is_wanted():
    subprocess.run([sys.executable, "-W", "ignore", "-c", LAZY], check=True)
