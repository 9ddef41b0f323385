"""Builds the C++ library into the wheel, which then fits every Python 3 on this platform.

Named in pyproject.toml as commands of setuptools. Needs CMake and a C++ compiler, never torch. An
editable install builds nothing: it uses the library that CMake leaves in build/.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import ExecError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError as error:  # only where --no-build-isolation takes what the environment has
    raise ImportError(
        "building kttrio needs a newer setuptools; run: pip install 'setuptools>=77' cmake ninja"
    ) from error

LIBRARY = Path("kttrio") / "libkttrio.so"


def find_tool(name: str) -> str | None:
    """A program of this Python's environment, else of the system."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def build_library(source: Path, build: Path) -> Path:
    """Configures and compiles in `build` and returns the library."""
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    if cmake is None:
        raise ExecError("cmake is missing; install it with pip or the system's package manager")
    configure = [cmake, "-S", str(source), "-B", str(build)]
    configure += ["-DCMAKE_BUILD_TYPE=Release", "-DKTT_BUILD_TESTS=OFF"]
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    # What an earlier build left may name another generator, or an isolated environment long gone.
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
    for command in (configure, [cmake, "--build", str(build), "--parallel"]):
        if subprocess.run(command, check=False).returncode != 0:
            raise ExecError(
                f"{' '.join(command)} failed, see above; it needs a C++ compiler "
                "(Debian and Ubuntu: apt install g++)"
            )
    return build / LIBRARY.name


class BuildPackage(build_py):
    """build_py, and the library next to the modules."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        build = Path(self.get_finalized_command("build").build_temp).resolve() / "native"
        library = build_library(Path(__file__).resolve().parents[1], build)
        shutil.copy2(library, Path(self.build_lib) / LIBRARY)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib) / LIBRARY)]


class PlatformWheel(bdist_wheel):
    """A wheel for one platform but any Python: the library is read through ctypes."""

    def finalize_options(self) -> None:
        self.distribution.has_ext_modules = lambda: True  # what makes setuptools think of platforms
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class SourceArchive(sdist):
    """The sources of the library travel with those of the package."""

    def make_distribution(self) -> None:
        for line in ("include CMakeLists.txt", "graft cpp", "graft tools", "global-exclude *.pyc"):
            self.filelist.process_template_line(line)
        super().make_distribution()
