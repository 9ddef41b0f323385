"""Finding and opening the library: what is said when it is absent, broken or of another age."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kttrio import native
from kttrio.native import NativeError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree whose package has no library."""
    package = tmp_path / "kttrio"
    package.mkdir()
    monkeypatch.setattr(native, "__file__", str(package / "native.py"))
    return tmp_path


def test_an_absent_library_names_the_command(tree: Path) -> None:
    assert native.library_candidates() == []
    with pytest.raises(NativeError, match="build it in the source tree: cmake -S"):
        native._library.__wrapped__()


def test_the_newest_library_is_taken(tree: Path) -> None:
    paths = [tree / "kttrio" / "libkttrio.so", tree / "build-x" / "libkttrio.so"]
    for age, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (1000 + age, 1000 + age))
    assert native.library_candidates() == paths[::-1]
    os.utime(paths[0], (2000, 2000))
    assert native.library_candidates() == paths


def test_a_broken_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / "libkttrio.so"
    path.write_bytes(b"not a library")
    with pytest.raises(NativeError, match=f"cannot use the expert library {path}.*build it again"):
        native.open_library(path)


def test_another_abi_version_is_refused(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler to build a library of another age")
    source = tmp_path / "old.cpp"
    source.write_text('extern "C" int ktt_abi_version() { return 999; }\n')
    library = tmp_path / "libkttrio.so"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    with pytest.raises(NativeError, match="speaks ABI version 999, this package 2; build it again"):
        native.open_library(library)


SHORT_OF_THREADS = """
import resource
from kttrio import native
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    native.Pool(threads=4096)
except native.NativeError as error:
    print(error)
print(native.Pool(threads=2).num_threads)
"""


def test_threads_that_cannot_start_are_an_error() -> None:
    found = subprocess.run(
        [sys.executable, "-c", SHORT_OF_THREADS],
        cwd=Path(__file__).resolve().parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    message, threads = found.stdout.splitlines()
    assert " of 4096 threads could be started: " in message
    assert "ask for fewer" in message
    assert threads == "2"


def test_native_never_imports_torch() -> None:
    tree = ast.parse(Path(native.__file__).read_text())
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    }
    assert modules <= {
        "__future__",
        "collections",
        "ctypes",
        "dataclasses",
        "functools",
        "pathlib",
        "types",
        "typing",
        "weakref",
    }


def test_the_best_of_a_family_is_the_one_a_pool_takes():
    for wanted in ("auto", *{name.split("_")[0] for name in native.isa_available()}):
        with native.Pool(threads=1, isa=wanted) as pool:
            assert pool.isa == native.best_isa(wanted)


def test_what_is_not_granted_stays_as_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(native, "isa_available", lambda: ("avx2_base",))
    assert native.best_isa("amx") == "amx"
