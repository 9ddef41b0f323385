"""Experts quantised by `kttrio quant`, or while loading, and served: with a real kill between."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kttrio.serve import DEMO_MODEL
from kttrio.weights.checkpoint import INDEX
from tests.e2e.conftest import ROOT, Server, running_server
from tools import synthetic

QUESTION = "What is kttrio?"


def quant(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kttrio", "quant", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def answer(server: Server) -> str:
    with server.client() as client:
        found = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=120,
        )
    return found.choices[0].message.content or ""


@pytest.fixture(scope="module")
def plain_answer(server: Server) -> str:
    """The demo model's answer with the experts it comes with."""
    text = answer(server)
    assert "experts" in text
    return text


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_the_quantised_demo_still_answers(tmp_path: Path, plain_answer: str, method: str) -> None:
    output = tmp_path / method
    made = quant("--input", DEMO_MODEL, "--output", output, "--method", method)
    assert made.returncode == 0, made.stderr
    with running_server("--kt-weight-path", str(output), "--kt-method", f"AMX{method}") as server:
        assert f"experts {method} in groups of" in server.output
        assert answer(server) == plain_answer
        assert server.stop() == 0


@pytest.mark.parametrize("activation", ["int8", "bfloat16", "float32"])
def test_quantising_while_loading_is_done_once(
    tmp_path: Path, plain_answer: str, activation: str
) -> None:
    cache = tmp_path / "cache"
    flags = ("--kt-method", "int8", "--kt-activation", activation, "--kt-cache-dir", str(cache))
    stamps = []
    for _ in range(2):
        with running_server(*flags) as server:
            assert "made from fp8" in server.output
            assert answer(server) == plain_answer
            assert server.stop() == 0
        stamps.append({path: path.stat().st_mtime_ns for path in cache.glob("*/*")})
    assert stamps[0] == stamps[1]
    assert any(path.name == INDEX for path in stamps[0])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of several shards, large enough to be caught half-way."""
    directory = tmp_path_factory.mktemp("large") / "model"
    fields = synthetic.config(layers=6, experts=24, hidden=512, intermediate=512)
    synthetic.write_checkpoint(directory, fields, shard_limit=60_000_000)
    yield directory
    shutil.rmtree(directory)


def test_a_conversion_that_was_killed_goes_on_and_is_served(large: Path, tmp_path: Path) -> None:
    assert len(list(large.glob("*.safetensors"))) > 3
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert quant("--input", large, "--output", whole, "--method", "int4").returncode == 0
    flags = ("--input", large, "--output", killed, "--method", "int4", "--threads", 1)
    kill_after_the_second_layer(*flags)
    done = set(killed.glob("experts-*.safetensors"))
    assert 2 <= len(done) < 6
    stamps = {path: path.stat().st_mtime_ns for path in done}

    refused = quant(*flags)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    unfinished = [sys.executable, "-m", "kttrio", "serve", "--model", large]
    served = subprocess.run(
        [*map(str, unfinished), "--kt-weight-path", str(killed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert served.returncode == 2
    assert "--resume" in served.stderr

    resumed = quant(*flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in done} == stamps
    assert sorted(os.listdir(killed)) == sorted(os.listdir(whole))
    for path in whole.iterdir():
        assert (killed / path.name).read_bytes() == path.read_bytes()
    with running_server("--model", str(large), "--kt-weight-path", str(killed)) as server:
        answer(server)
        assert server.stop() == 0


def kill_after_the_second_layer(*flags: object) -> None:
    command = [sys.executable, "-m", "kttrio", "quant", *map(str, flags)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("2 of 6 layers"):
                process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
