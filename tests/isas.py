"""The kernel tables a test runs on, each skipped aloud where the machine lacks it."""

from __future__ import annotations

import pytest

from kttrio import native

TABLES = ("amx", "avx512_bf16", "avx512_vnni", "avx512_base", "avx2_vnni", "avx2_base")

EVERY_ISA = [
    pytest.param(
        isa,
        marks=[
            *([pytest.mark.amx] if isa == "amx" else []),
            pytest.mark.skipif(
                isa not in native.isa_available(), reason=f"this machine grants no {isa}"
            ),
        ],
    )
    for isa in TABLES
]
