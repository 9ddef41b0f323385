"""tools/bench as a person runs it; the numbers themselves are the machine's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Server


def bench(*argv: str) -> str:
    found = subprocess.run(
        [sys.executable, "-m", "tools.bench", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_load_measures_every_level_and_finds_nothing_left(server: Server, tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    flags = ["--url", server.url, "--concurrency", "1,64", "--max-tokens", "16"]
    out = bench("load", *flags, "--json", str(numbers))
    assert "in use afterwards: 0 requests, 0 pages, 0 slots" in out
    levels = json.loads(numbers.read_text())["levels"]
    assert [level["concurrency"] for level in levels] == [1, 64]
    assert [level["errors"] for level in levels] == [0, 0]
    assert levels[1]["output_tokens"] == 3 * 64 * 16
    assert levels[1]["first_token_ms"]["p50"] > 0
    assert levels[1]["health_samples"] > 0


def test_load_can_let_clients_vanish(server: Server, tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    flags = ["--concurrency", "8", "--requests", "16", "--disconnect", "0.5"]
    out = bench("load", "--url", server.url, *flags, "--json", str(numbers))
    assert "in use afterwards: 0 requests, 0 pages, 0 slots" in out
    (level,) = json.loads(numbers.read_text())["levels"]
    assert 0 < level["vanished"] < 16
    assert level["errors"] == 0


@pytest.mark.parametrize(
    "argv",
    [
        ["front", "--streams", "4", "--step-ms", "2", "--max-tokens", "60"],
        ["step", "--streams", "2", "--max-tokens", "40"],
    ],
    ids=["front", "step"],
)
def test_the_cost_of_serving_is_printed(argv: list[str]) -> None:
    out = bench(*argv)
    ratio = re.search(r"step when served +[\d.]+ ms, ([\d.]+) times as long", out)
    assert ratio is not None
    assert float(ratio.group(1)) > 0
