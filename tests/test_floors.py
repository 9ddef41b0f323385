"""The house plan, asserted: who may import whom, and what no file may contain.

`FLOORS` is the plan; the rest reads sources and compares. Every rule is also shown a source that
breaks it, so that a rule which sees nothing fails here.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kttrio"
CPP = ROOT / "cpp"

BACK = ("runner", "models", "experts", "layers", "weights", "device")
FLOORS: dict[str, tuple[str, ...]] = {
    # a part of the package -> the parts it may import, beside itself
    "__main__": ("cli",),
    "cli": ("serve", "client", "server", "text", "engine", *BACK, "native", "config", "request"),
    "serve": ("server", "text", "engine", *BACK, "native", "config", "request", "plan"),
    "client": (),
    "server": ("engine", "text", "client", "config", "request"),
    "text": ("config", "request"),
    "engine": ("config", "request", "plan"),
    "runner": (
        *("models", "experts", "layers", "weights", "device"),
        *("native", "config", "plan", "request"),
    ),
    "models": ("experts", "layers", "weights", "device", "config"),
    "experts": ("layers", "weights", "device", "native", "config"),
    "layers": ("weights", "device"),
    "weights": ("config",),
    "device": ("native",),
    "native": (),
    "plan": ("request",),
    "request": (),
    "config": (),
}
ROOMS = ("openai", "responses", "anthropic", "triton", "grpc", "operators")
WEB = ("trio", "quart", "quart_trio", "hypercorn", "h11")
TENSORS = ("torch", "safetensors", "numpy")
MAX_FUNCTION_LINES = 80
FORBIDDEN_NAMES = ("utils", "util", "common", "helpers", "helper", "misc")


@dataclass(frozen=True)
class Source:
    """One module: dotted name without `kttrio.`, its text parsed."""

    name: str
    text: str
    is_package: bool = False
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", ast.parse(self.text))

    @property
    def part(self) -> str:
        return self.name.partition(".")[0]

    def imports(self) -> Iterator[str]:
        """Full names of everything imported anywhere in the file, relative ones resolved."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                yield from (f"{base}.{alias.name}" for alias in node.names)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = ["kttrio", *self.name.split(".")]
        parts = parts[: len(parts) - node.level + int(self.is_package)]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def inner(self) -> Iterator[str]:
        """Imports from the package itself, without `kttrio.`."""
        yield from (name[7:] for name in self.imports() if name.startswith("kttrio."))

    def outer(self) -> Iterator[str]:
        """Top-level names of all other imports."""
        yield from (name.partition(".")[0] for name in self.imports())


@cache
def read_package() -> list[Source]:
    sources = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        sources.append(Source(name or "__init__", path.read_text("utf-8"), is_package))
    return sources


# Each rule yields what is wrong with one source.


def floors(source: Source) -> Iterator[str]:
    if source.name == "__init__":
        return
    allowed = FLOORS.get(source.part)
    if allowed is None:
        yield f"{source.name} is in no part of the plan; add it to FLOORS and to the README"
        return
    for name in source.inner():
        part = name.partition(".")[0]
        if part not in (*allowed, source.part):
            yield f"{source.name} imports {name}"
    if any(name == "kttrio" for name in source.imports()):
        yield f"{source.name} imports the bare package"


def models_keep_apart(source: Source) -> Iterator[str]:
    """A family may import `base` and `blocks`; these never import a family, nor what loads it."""
    if source.part != "models" or source.name in ("models", "models.base"):
        return
    for name in source.inner():
        parts = name.split(".")
        shared = parts[1:2] in (["base"], ["blocks"], source.name.split(".")[1:2])
        if parts[0] == "models" and not shared:
            yield f"{source.name} imports {name}"


def rooms_keep_apart(source: Source) -> Iterator[str]:
    """A protocol has a room of server/. What two of them need moves down, beside the rooms or into
    `asking`. Only the app knows them all; gRPC is another way to Triton's inference."""
    parts = source.name.split(".")
    if parts[0] != "server" or source.name == "server.app":
        return
    own = ("grpc", "triton") if "grpc" in parts else parts[1:2]
    for name in source.inner():
        room = name.split(".")[1] if name.startswith("server.") else ""
        if room in ROOMS and room not in own:
            yield f"{source.name} imports {name}"


def wings_keep_apart(source: Source) -> Iterator[str]:
    forbidden: tuple[str, ...] = ()
    if source.part in (*BACK, "native"):
        forbidden = WEB
    elif source.part in ("text", "engine", "server", "client", "config", "request", "plan"):
        forbidden = TENSORS
    if source.part in ("text", "config", "request", "plan"):
        forbidden += WEB
    if source.part == "engine" and source.name not in ("engine.engine", "engine.event_stream"):
        forbidden += ("trio",)
    for name in source.outer():
        if name in forbidden:
            yield f"{source.name} imports {name}"


def web_framework_only_in_server(source: Source) -> Iterator[str]:
    for name in source.outer():
        if name in ("quart", "quart_trio") and source.part != "server":
            yield f"{source.name} imports {name}"
        if name == "hypercorn" and source.part not in ("server", "serve"):
            yield f"{source.name} imports {name}"


def libraries_only_at_the_walls(source: Source) -> Iterator[str]:
    if source.name not in ("native", "device.driver") and "ctypes" in source.outer():
        yield f"{source.name} imports ctypes"


def environment_only_in_cli(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        name = _dotted(node)
        if name in ("os.environ", "os.getenv", "os.putenv") and source.part != "cli":
            yield f"{source.name}:{_line(node)} reads {name}"
    if source.part != "cli":
        for name in source.imports():
            if name in ("os.environ", "os.getenv"):
                yield f"{source.name} imports {name}"


def print_only_in_cli(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and _dotted(node.func) == "print" and source.part != "cli":
            yield f"{source.name}:{node.lineno} prints; log instead"


def no_type_checking(source: Source) -> Iterator[str]:
    if "TYPE_CHECKING" in source.text:
        yield f"{source.name} hides imports behind TYPE_CHECKING"


def empty_init(source: Source) -> Iterator[str]:
    if not (source.is_package or source.name == "__init__"):
        return
    for node in source.tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not docstring and not future:
            yield f"{source.name}/__init__.py:{node.lineno} has logic"


def telling_names(source: Source) -> Iterator[str]:
    for word in source.name.split("."):
        if word in FORBIDDEN_NAMES:
            yield f"{source.name}: a module is named after its job, not {word!r}"


def short_functions(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{source.name}.{node.name} has {length} lines"


def no_module_state(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"{source.name}:{node.lineno} writes a global"
    for node in source.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            name = _dotted(target)
            constant = name.isupper() or name == "__all__"
            if name and not constant and _is_mutable(node.value):
                yield f"{source.name}:{node.lineno} keeps state in {name}"


def _is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return _dotted(value.func).rpartition(".")[2] in ("list", "dict", "set", "deque", "Lock")
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _line(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)


RULES: dict[Callable[[Source], Iterator[str]], list[Source]] = {
    # a rule -> sources it must object to
    floors: [
        Source("layers.linear", "from kttrio.experts import bank"),
        Source("engine.engine", "from kttrio.text.tokenizer import Tokenizer"),
        Source("engine.engine", "import kttrio.runner.runner"),
        Source("runner.runner", "from kttrio.engine.engine import Engine"),
        Source("text.tokenizer", "from ..engine import engine"),
        Source("server.app", "def f():\n    from kttrio.serve import serve"),
        Source("experts.bank", "from kttrio.cli.flags import flag_name"),
        Source("weights.loader", "from kttrio import layers"),
        Source("attic.junk", ""),
    ],
    models_keep_apart: [
        Source("models.qwen3_moe", "from kttrio.models.qwen3_next import Attention"),
        Source("models.qwen3_moe", "from .qwen3_next import Attention"),
        Source("models.blocks.mlp", "from kttrio.models.qwen3_next import parse"),
        Source("models.qwen3_moe", "from kttrio.models.loading import estimate"),
    ],
    rooms_keep_apart: [
        Source("server.responses.request", "from kttrio.server.openai.request import ChatBody"),
        Source("server.triton.routes", "from kttrio.server.grpc.tensors import read_message"),
        Source("server.asking.forms", "from kttrio.server.openai.request import ChatBody"),
        Source("server.state", "from kttrio.server.triton.tensors import Tensor"),
    ],
    wings_keep_apart: [
        Source("server.app", "import torch.nn"),
        Source("engine.scheduler", "import trio"),
        Source("runner.runner", "from trio import to_thread"),
        Source("text.template", "import quart"),
        Source("plan", "from numpy import array"),
    ],
    web_framework_only_in_server: [
        Source("serve", "from quart_trio import QuartTrio"),
        Source("cli.serve", "import hypercorn.trio"),
    ],
    libraries_only_at_the_walls: [
        Source("experts.host", "from ctypes import c_int"),
        Source("device.cuda", "import ctypes"),
    ],
    environment_only_in_cli: [
        Source("serve", "import os\nx = os.environ['X']"),
        Source("runner.build", "from os import getenv"),
    ],
    print_only_in_cli: [Source("engine.engine", "def f():\n    print(1)")],
    no_type_checking: [Source("engine.engine", "from typing import TYPE_CHECKING")],
    empty_init: [Source("engine", "from kttrio.engine.engine import Engine", is_package=True)],
    telling_names: [Source("text.utils", ""), Source("common", "")],
    short_functions: [Source("plan", "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES)],
    no_module_state: [
        Source("plan", "cache = {}"),
        Source("plan", "_seen: set[int] = set()"),
        Source("plan", "def f():\n    global x\n    x = 1"),
    ],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule: Callable[[Source], Iterator[str]]) -> None:
    assert [wrong for source in read_package() for wrong in rule(source)] == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [(rule, source) for rule, broken in RULES.items() for source in broken],
    ids=lambda value: value.name if isinstance(value, Source) else value.__name__,
)
def test_the_rule_sees_a_break(rule: Callable[[Source], Iterator[str]], source: Source) -> None:
    assert list(rule(source))


def test_every_part_of_the_plan_exists() -> None:
    parts = {source.part for source in read_package()} - {"__init__"}
    assert parts == set(FLOORS)


def find_circle(edges: dict[str, set[str]]) -> list[str]:
    """Names along a circle of imports, or an empty list."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges.get(name, ())):
            circle = visit(other, [*path, name])
            if circle:
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(edges) if (circle := visit(name, []))), [])


def module_edges(sources: list[Source]) -> dict[str, set[str]]:
    names = {source.name for source in sources}

    def module(name: str) -> str:
        while name and name not in names:
            name = name.rpartition(".")[0]
        return name

    return {
        source.name: {module(name) for name in source.inner()} - {"", source.name}
        for source in sources
    }


def test_no_circle_of_imports() -> None:
    assert find_circle(module_edges(read_package())) == []


def test_a_circle_is_seen() -> None:
    sources = [
        Source("a", "from kttrio.b import x"),
        Source("b", "def f():\n    import kttrio.c.d"),
        Source("c.d", "from kttrio import a"),
    ]
    assert find_circle(module_edges(sources)) == ["a", "b", "c.d", "a"]


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("kttrio.server.app kttrio.engine.engine kttrio.text.tokenizer kttrio.client", "torch"),
        ("kttrio.runner.runner kttrio.models.qwen3_next kttrio.experts.block", "trio quart"),
        ("kttrio.cli.main kttrio.cli.flags kttrio.cli.chat", "torch quart"),
    ],
)
def test_a_wing_runs_without_the_other(modules: str, absent: str) -> None:
    """What the imports say is also what Python does, third-party packages included."""
    code = "\n".join(
        [f"import {', '.join(modules.split())}", "import sys"]
        + [f"assert {name!r} not in sys.modules" for name in absent.split()]
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


# The C++ side.

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"][^">]+[">])', re.MULTILINE)
INTRINSICS = re.compile(r"\b(_mm\d*_|__m(128|256|512)|_tile_)|<(imm|x86|amx)\w*intrin\.h>")


def kernel_includes(path: str, text: str) -> Iterator[str]:
    """kernels/ includes the intrinsics, freestanding standard headers and itself."""
    standard = {"<immintrin.h>", "<cstdint>", "<cstddef>", "<cstring>", "<limits>"}
    for name in INCLUDE.findall(text):
        own = name.startswith('"') and "/" not in name.strip('"').removeprefix("kernels/")
        if not own and name not in standard:
            yield f"{path} includes {name}"


def no_intrinsics(path: str, text: str) -> Iterator[str]:
    found = INTRINSICS.search(text)
    if found:
        yield f"{path} uses {found.group(0)}"


def no_public_header(path: str, text: str) -> Iterator[str]:
    for name in INCLUDE.findall(text):
        if name.strip('<>"').endswith("kttrio.h"):
            yield f"{path} includes {name}"


def cpp_files(*patterns: str) -> list[tuple[str, str]]:
    found = [path for pattern in patterns for path in sorted(CPP.glob(pattern))]
    assert found, f"no file matches {patterns}: the rule would see nothing"
    return [(str(path.relative_to(CPP)), path.read_text("utf-8")) for path in found]


def test_kernels_include_only_themselves() -> None:
    files = cpp_files("src/kernels/*.h", "src/kernels/*.cpp")
    assert [wrong for file in files for wrong in kernel_includes(*file)] == []


def test_driver_and_pool_have_no_intrinsics() -> None:
    files = cpp_files("src/moe.*", "src/run*", "src/job.*", "src/pool.*")
    assert [wrong for file in files for wrong in no_intrinsics(*file)] == []


def test_only_the_wall_knows_the_public_header() -> None:
    files = [file for file in cpp_files("src/**/*.h", "src/**/*.cpp") if "capi" not in file[0]]
    assert [wrong for file in files for wrong in no_public_header(*file)] == []


def test_the_cpp_rules_see_a_break() -> None:
    assert list(kernel_includes("k.h", '#include <vector>\n#include "../pool.h"'))
    assert not list(kernel_includes("k.h", '#include "gemm.h"\n#include <immintrin.h>'))
    assert list(no_intrinsics("moe.cpp", "auto x = _mm512_setzero_ps();"))
    assert list(no_intrinsics("pool.cpp", "#include <immintrin.h>"))
    assert list(no_public_header("moe.h", '#include "../include/kttrio.h"'))
