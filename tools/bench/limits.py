"""What the machine can do at most, asked of `kttrio_limits`, the C++ program beside the library."""

from __future__ import annotations

import json
import subprocess
from subprocess import PIPE
from types import TracebackType
from typing import Self

from kttrio.native import NativeError
from tools.bench.programs import find_program

MIB_TO_READ = 512  # far beyond any cache, and read in some milliseconds

# The instruction that multiplies for a kernel table in an activation mode. Where none is named the
# table multiplies in fp32.
PEAKS = {
    ("amx", "bfloat16"): "bf16_tiles",
    ("amx", "int8"): "int8_tiles",
    ("avx512_bf16", "bfloat16"): "bf16_zmm",
    ("avx512_bf16", "int8"): "int8_vnni_zmm",
    ("avx512_vnni", "int8"): "int8_vnni_zmm",
    ("avx512_base", "int8"): "int8_zmm",
    ("avx2_vnni", "int8"): "int8_vnni_ymm",
    ("avx2_base", "int8"): "int8_ymm",
}


def peak_name(isa: str, activation: str) -> str:
    """The name of the limit that the matrix products of a layer have."""
    return PEAKS.get((isa, activation), "fp32_ymm" if isa.startswith("avx2") else "fp32_zmm")


class Limits:
    """Limits on some threads: medians of several runs in bytes or operations per second."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        command = [find_program("kttrio_limits"), str(num_threads), str(MIB_TO_READ)]
        self._process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True)
        found = json.loads(self._answer())
        self.huge_share: float = found["huge_share"]
        """How much of the memory for `read_2m` lay on such pages."""
        self.rates: dict[str, float] = {
            name: value["median"] for name, value in found.items() if isinstance(value, dict)
        }

    def read_now(self) -> float:
        """Bytes per second of one more reading of 2M pages, at this moment."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            self._process.communicate()
            code = self._process.returncode
            raise NativeError(f"kttrio_limits ended with code {code} instead of measuring")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()  # the end of its input ends it
