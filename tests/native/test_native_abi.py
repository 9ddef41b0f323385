"""The header's prototypes and constants against what native.py declares to ctypes."""

from __future__ import annotations

import re
import shutil
import subprocess
from ctypes import POINTER, Structure, c_char_p, c_int32, c_uint64, c_void_p
from pathlib import Path

import pytest

from kttrio import native

ROOT = Path(native.__file__).resolve().parents[1]
HEADER = ROOT / "cpp" / "include" / "kttrio.h"

CTYPES = {
    "void": None,
    "int32_t": c_int32,
    "uint64_t": c_uint64,
    "const char*": c_char_p,
    "void*": c_void_p,
    "const void*": c_void_p,
    "ktt_pool*": c_void_p,
    "const ktt_pool*": c_void_p,
    "ktt_layer*": c_void_p,
    "const ktt_layer*": c_void_p,
    "ktt_job*": c_void_p,
    "ktt_pool**": POINTER(c_void_p),
    "ktt_layer**": POINTER(c_void_p),
    "ktt_job**": POINTER(c_void_p),
    "const ktt_expert*": POINTER(native._Expert),
    "const ktt_forward*": POINTER(native._Forward),
    "int32_t*": POINTER(c_int32),
    "const int32_t*": c_void_p,
    "const uint32_t*": c_void_p,
    "uint32_t*": c_void_p,
    "uint64_t*": POINTER(c_uint64),
    "const float*": c_void_p,
}


def header_text() -> str:
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)


def header_prototypes() -> dict[str, tuple[type, tuple[type, ...]]]:
    text = header_text()
    found = {}
    for result, name, arguments in re.findall(
        r"KTT_API ([\w* ]+?)\s*(ktt_\w+)\((.*?)\);", text, re.S
    ):
        types = [
            CTYPES[re.sub(r"\s*\w+$", "", " ".join(argument.split()))]
            for argument in arguments.split(",")
            if argument.strip() != "void"
        ]
        found[name] = (CTYPES[result.strip()], tuple(types))
    return found


def header_fields(name: str) -> list[tuple[str, type]]:
    """What a struct of the header holds, in its order."""
    body = re.search(r"typedef struct \{([^}]*)\} " + name, header_text())
    assert body is not None
    return [(field, CTYPES[kind]) for kind, field in re.findall(r"(\w[\w ]*\**) (\w+);", body[1])]


def header_constants() -> dict[str, int]:
    return {
        name: int(value)
        for name, value in re.findall(r"\b(KTT_[A-Z0-9_]+)(?: = | )(\d+)\b", HEADER.read_text())
    }


def test_every_prototype_matches() -> None:
    prototypes = header_prototypes()
    assert len(prototypes) == HEADER.read_text().count("KTT_API ") - HEADER.read_text().count(
        "define KTT_API "
    )
    assert prototypes == native.PROTOTYPES


def test_constants_match() -> None:
    constants = header_constants()
    assert constants["KTT_ABI_VERSION"] == native.ABI_VERSION
    for name, value in native._ISAS.items():
        assert constants[f"KTT_ISA_{name.upper()}"] == value
    for name, form in native._FORMATS.items():
        assert constants[f"KTT_FORMAT_{name.upper()}"] == form.value
    for name, value in native._DTYPES.items():
        assert constants[f"KTT_{name.upper()}"] == value
    for name, value in native._ACTIVATIONS.items():
        assert constants[f"KTT_ACTIVATION_{name.upper()}"] == value


@pytest.mark.parametrize(
    ("name", "structure"), [("ktt_expert", native._Expert), ("ktt_forward", native._Forward)]
)
def test_structures_match(name: str, structure: type[Structure]) -> None:
    assert header_fields(name) == list(structure._fields_)


C_CALLER = """
#include <stdio.h>
#include "kttrio.h"

int main(void) {
  ktt_pool* pool = NULL;
  ktt_layer* layer = NULL;
  uint16_t matrix[32 * 32] = {0};
  float x[32] = {1.0f}, out[32] = {7.0f}, weight = 1.0f;
  int32_t id = 0;
  ktt_expert expert = {0};
  ktt_forward args = {0};
  expert.gate = expert.up = expert.down = matrix;
  expert.matrix_bytes = sizeof matrix;
  args.num_tokens = args.top_k = 1;
  args.ids = &id;
  args.weights = &weight;
  args.x = x;
  args.out = out;
  if (ktt_abi_version() != KTT_ABI_VERSION) return 1;
  if (ktt_pool_create(99, 1, NULL, 1, &pool) != KTT_INVALID_ARGUMENT) return 2;
  puts(ktt_last_error());
  if (ktt_pool_create(KTT_ISA_AUTO, 1, NULL, 1, &pool) != KTT_OK) return 3;
  if (ktt_layer_create(pool, 1, 32, 32, KTT_FORMAT_BF16, 0, KTT_ACTIVATION_FLOAT32, 1, 1, &layer))
    return 4;
  if (ktt_layer_set_expert(layer, 0, &expert) != KTT_OK) return 5;
  if (ktt_layer_forward(layer, &args) != KTT_OK) return 6;
  if (out[0] != 0.0f) return 7;
  return ktt_pool_destroy(pool) != KTT_OK || ktt_layer_destroy(layer) != KTT_OK;
}
"""


def test_a_c_program_may_call_the_library(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a compiler to build a caller in C")
    (tmp_path / "caller.c").write_text(C_CALLER)
    library = native.library_candidates()[0]
    strict = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wstrict-prototypes", "-Werror"]
    inputs = [f"-I{HEADER.parent}", "-x", "c", tmp_path / "caller.c", "-x", "none", library]
    output = [f"-Wl,-rpath,{library.parent}", "-o", tmp_path / "caller"]
    subprocess.run([compiler, *strict, *inputs, *output], check=True)
    found = subprocess.run([tmp_path / "caller"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "isa is 99, but must be from 0 to 8\n")


def test_the_library_exports_the_header_and_nothing_else() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm to read the library's symbols")
    library = native.library_candidates()[0]
    listing = subprocess.run(
        [nm, "-D", "--defined-only", library], check=True, capture_output=True, text=True
    ).stdout
    assert {line.split()[-1] for line in listing.splitlines()} == set(native.PROTOTYPES)
