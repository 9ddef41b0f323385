"""The limits that shares are shares of."""

from __future__ import annotations

import pytest

from kttrio.native import NativeError, isa_available
from tools.bench import limits as limits_module
from tools.bench.limits import Limits, peak_name
from tools.bench.programs import find_program


def test_every_kernel_table_has_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "MIB_TO_READ", 16)
    with Limits(1) as limits:
        names = {
            peak_name(isa, activation)
            for isa in isa_available()
            for activation in ("float32", "bfloat16", "int8")
        }
        assert names <= limits.rates.keys()
        assert all(limits.rates[name] > 1e9 for name in names)
        assert 0 <= limits.huge_share <= 1
        assert limits.read_now() > 1e8
        assert limits.read_now() > 1e8


def test_more_threads_than_cores_are_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits_module, "MIB_TO_READ", 1_000_000)
    with pytest.raises(NativeError, match="kttrio_limits ended with code 2"):
        Limits(100_000)
    assert "this process may use" in capfd.readouterr().err


def test_a_program_that_was_not_built_is_named() -> None:
    with pytest.raises(NativeError, match=r"no build\*/kttrio_nothing .* build it: cmake"):
        find_program("kttrio_nothing")
