"""Packaging: the source archive is enough to build a wheel that holds the library."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kttrio import native

ROOT = Path(__file__).resolve().parents[2]
BUILD_SDIST = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"


def test_a_setuptools_too_old_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools")
    monkeypatch.setitem(sys.modules, "setuptools.command.bdist_wheel", None)
    with pytest.raises(ImportError, match="pip install 'setuptools>=77' cmake ninja"):
        runpy.run_path(str(ROOT / "tools" / "build_native.py"))


@pytest.mark.slow
def test_a_wheel_from_the_source_archive_fits_every_python(tmp_path: Path) -> None:
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools, as an installation without build isolation does")
    subprocess.run(
        [sys.executable, "-c", BUILD_SDIST, tmp_path], cwd=ROOT, check=True, capture_output=True
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path, archive],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        content.extractall(tmp_path / "unpacked")
    assert "kttrio/libkttrio.so" in names
    assert not [name for name in names if name.startswith(("tools/", "cpp/", "tests/"))]
    code = "from kttrio import native; print(native.library_candidates()[0], native.abi_version())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "unpacked",
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == [
        str(tmp_path / "unpacked/kttrio/libkttrio.so"),
        str(native.ABI_VERSION),
    ]
