"""`kttrio plan` for a GPU that is not here: launch commands of tutorials, and what mends them."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest

from kttrio.cli.main import run
from tests.published import published_file

# As the tutorials of KTransformers print them, without paths; and a machine that they name.
FP8 = """--kt-cpuinfer 96 --kt-threadpool-count 2 --kt-num-gpu-experts 100 --kt-method FP8
    --kt-gpu-prefill-token-threshold 2048 --attention-backend triton --trust-remote-code
    --mem-fraction-static 0.80 --chunked-prefill-size 16384 --max-running-requests 4
    --max-total-tokens 256000 --served-model-name Qwen3-Coder-Next --enable-mixed-chunk
    --tensor-parallel-size 1 --enable-p2p-check --disable-shared-experts-fusion
    --fp8-gemm-backend cutlass --tool-call-parser qwen3_coder --kt-enable-dynamic-expert-update"""
BF16 = FP8.replace("FP8", "BF16").replace("experts 100", "experts 60")
QWEN3_5 = """--kt-cpuinfer 60 --kt-threadpool-count 2 --kt-num-gpu-experts 1 --kt-method BF16
    --attention-backend triton --trust-remote-code --mem-fraction-static 0.98
    --chunked-prefill-size 4096 --max-running-requests 32 --max-total-tokens 32000
    --served-model-name qwen3.5 --enable-mixed-chunk --tensor-parallel-size 4
    --enable-p2p-check --disable-shared-experts-fusion --disable-custom-all-reduce"""
DEEPSEEK = """--kt-cpuinfer 60 --kt-threadpool-count 2 --kt-num-gpu-experts 1
    --attention-backend triton --trust-remote-code --mem-fraction-static 0.98
    --chunked-prefill-size 4096 --max-running-requests 32 --max-total-tokens 40000
    --served-model-name DeepSeek-V3.2 --enable-mixed-chunk --tensor-parallel-size 1
    --enable-p2p-check --disable-shared-experts-fusion --kt-method AMXINT4"""
SCHEDULING = "--kt-num-gpu-experts 8 --kt-expert-placement-strategy uniform"
UPDATING = """--kt-num-gpu-experts 8 --kt-expert-placement-strategy frequency
    --kt-enable-dynamic-expert-update --kt-gpu-prefill-token-threshold 512"""
COMMANDS = {
    "Coder-Next FP8": ("Qwen3-Next-80B-A3B-FP8", FP8, "32GiB", "128GiB"),
    "Coder-Next BF16": ("Qwen3-Coder-Next", BF16, "48GiB", "256GiB"),
    "Qwen3.5 BF16": ("Qwen3.5-397B-A17B", QWEN3_5, "48GiB", "1TiB"),
    "DeepSeek-V3.2": ("DeepSeek-V3.2", DEEPSEEK, "80GiB", "512GiB"),
    "scheduling": ("Qwen3-Next-80B-A3B-FP8", SCHEDULING, "24GiB", "256GiB"),
    "updating": ("Qwen3-Next-80B-A3B-FP8", UPDATING, "24GiB", "256GiB"),
    "nothing asked": ("Qwen3-30B-A3B", "", "12GiB", "96GiB"),
}


def plan(model: str, flags: str, gpu: str, host: str, *more: str) -> list[str]:
    sizes = ["--gpu-memory", gpu, "--memory", host]
    return ["plan", "--model", str(published_file(model)), *sizes, *shlex.split(flags), *more]


def report(capsys: pytest.CaptureFixture[str], argv: list[str]) -> dict[str, Any]:
    run([*argv, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_launch_commands_fit_where_they_should(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    found = report(capsys, plan(*COMMANDS[name]))
    assert not found["refusal"]
    host, device = found["memories"]
    assert (host["where"], device["where"]) == ("cpu", "cuda")
    for memory in (host, device):
        assert memory["bytes"] <= memory["budget_bytes"] <= memory["available_bytes"]
    asked = re.search(r"--kt-num-gpu-experts (\d+)", COMMANDS[name][1])
    experts = found["experts"]
    each = experts["on_device"] * experts["bytes_each"]
    rows = {row["name"]: row["bytes"] for row in found["memory"]}
    assert rows["device experts"] == pytest.approx(each, rel=1e-9)
    if asked:
        share = int(asked[1]) / found["shape"]["num_experts"]
        assert experts["on_device"] == pytest.approx(share * experts["number"])
    else:
        left = device["budget_bytes"] - device["bytes"]
        assert left < experts["bytes_each"] or experts["on_device"] == experts["number"]


TOO_SMALL = {
    "too many experts": ("Qwen3-Next-80B-A3B-FP8", FP8, "24GiB", "128GiB"),
    "by their share": (
        "Qwen3-Next-80B-A3B-FP8",
        "--kt-gpu-experts-ratio 0.5 --max-running-requests 4",
        "24GiB",
        "128GiB",
    ),
    "little memory on the host": (
        "Qwen3-Next-80B-A3B",
        "--kt-num-gpu-experts 1 --max-running-requests 1",
        "80GiB",
        "128GiB",
    ),
    "a small share": ("Qwen3-30B-A3B", "--mem-fraction-static 0.1", "24GiB", "96GiB"),
    "a long context": (
        "DeepSeek-V3.2",
        DEEPSEEK.replace("--max-total-tokens 40000", "") + " --context-length 150000",
        "48GiB",
        "512GiB",
    ),
    "neither memory": ("DeepSeek-V3.2", DEEPSEEK, "24GiB", "64GiB"),
}


@pytest.mark.parametrize("name", TOO_SMALL)
def test_each_mend_of_a_refusal_helps(capsys: pytest.CaptureFixture[str], name: str) -> None:
    model, flags, gpu, host = TOO_SMALL[name]
    refusal = report(capsys, plan(model, flags, gpu, host))["refusal"]
    mends = refusal.rpartition("; it would start with ")[2].split(", or with ")
    assert 1 <= len(mends) <= 3
    for mend in mends:
        changed = {"--gpu-memory": gpu, "--memory": host}
        if found := re.search(r"about ([\d.]+ \w+) free on the GPU", mend):
            changed["--gpu-memory"] = added(found[1])
        if found := re.search(r"about ([\d.]+ \w+) available", mend):
            changed["--memory"] = found[1].replace(" ", "")
        more = re.findall(r"(--[\w-]+) ([\w.]+)", mend)
        argv = plan(model, flags, changed["--gpu-memory"], changed["--memory"])
        assert not report(capsys, [*argv, *(word for pair in more for word in pair)])["refusal"], (
            mend
        )


def added(free: str) -> str:
    """The GPU with so much left once CUDA has its own part."""
    value, unit = free.split()
    assert unit == "GiB"
    return f"{float(value) + 0.5}GiB"


def test_a_gpu_is_no_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    argv = plan("Qwen3-30B-A3B", "--device cpu", "24GiB", "96GiB")
    assert run(argv) == 2
    assert "--gpu-memory is a GPU's, but --device is cpu" in capsys.readouterr().err


def test_a_cpu_that_stands_in_has_one_memory(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--memory", "128GiB", "--device", "cpu", "--kt-num-gpu-experts", "8"]
    argv = ["plan", "--model", str(published_file("Qwen3-30B-A3B")), *flags]
    found = report(capsys, argv)
    (memory,) = found["memories"]
    assert memory["where"] == "cpu"
    assert found["experts"]["on_device"] == 8 * 48
    run(argv)
    assert "on device   384 of 6144 experts (6%)" in capsys.readouterr().out
