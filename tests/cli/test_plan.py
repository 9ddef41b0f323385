"""`kttrio plan`: its flags, what is shown, and exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kttrio.cli.main import run
from kttrio.cli.plan import parse_bytes
from kttrio.config import ConfigError

PUBLISHED = Path(__file__).parents[1] / "models" / "published"
CODER_NEXT = str(PUBLISHED / "Qwen3-Coder-Next.json")


def test_it_shows_weights_memory_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", CODER_NEXT, "--memory", "256GiB"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "routed experts 77,309,411,328 144.0 GiB all 79,674,391,296 148.5 GiB" in shown
    assert "memory where size experts cpu 144.0 GiB" in shown
    assert "a token 24576 bytes of KV cache a sequence 73.7 MiB of recurrent state" in shown
    assert "precision bfloat16, experts bf16, 6.0 MiB each" in shown
    assert "verdict it fits" in shown


def test_what_does_not_fit_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", CODER_NEXT, "--memory", "64GB"]) == 1
    shown = capsys.readouterr().out
    assert "verdict     the model does not fit: already with --max-running-requests 1 " in shown
    assert "experts 144.0 GiB, " in shown
    assert shown.endswith("; it would start with --kt-method int4 (experts 38.2 GiB)\n")
    assert "at a time" not in shown
    assert run(["plan", "--model", CODER_NEXT, "--memory", "64GB", "--kt-method", "int4"]) == 0
    assert "verdict     it fits" in capsys.readouterr().out


def test_what_the_verdict_recommends_helps(capsys: pytest.CaptureFixture[str]) -> None:
    """Each of the numbers, tried."""
    tight = ["plan", "--model", CODER_NEXT, "--memory", "54GiB", "--kt-method", "int4"]
    assert run(tight) == 1
    mends = capsys.readouterr().out.rpartition("; ")[2]
    assert "int4" not in mends
    (share,) = re.findall(r"it would start with --mem-fraction-static (\S+)$", mends)
    assert run([*tight, "--mem-fraction-static", share]) == 0


def test_two_mends_may_be_needed_together(capsys: pytest.CaptureFixture[str]) -> None:
    tight = ["plan", "--model", CODER_NEXT, "--memory", "54GiB"]
    assert run(tight) == 1
    mends = capsys.readouterr().out.rpartition("; it would start with ")[2]
    assert mends.startswith("--kt-method int4 (experts 38.2 GiB) and --mem-fraction-static 0.")
    share = mends.partition(", or with ")[0].split()[-1]
    assert run([*tight, "--kt-method", "int4", "--mem-fraction-static", share]) == 0


def test_short_sequences_are_part_of_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", CODER_NEXT, "--memory", "1TB", "--context-length", "1000"]) == 0
    shown = capsys.readouterr().out
    assert "it fits, for sequences of at most 1000 of the model's 262144 tokens" in shown


def test_programs_get_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", CODER_NEXT, "--memory", "1TB", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 79_674_391_296
    assert [memory["available_bytes"] for memory in report["memories"]] == [10**12]


def test_it_takes_the_command_line_of_serve(caplog: pytest.LogCaptureFixture) -> None:
    flags = "--attention-backend triton --served-model-name x --kt-num-gpu-experts 8 --port 0"
    assert run(["plan", *flags.split()]) == 0
    assert "--attention-backend (a CPU has one kernel for each layer)" in caplog.text
    assert "--kt-num-gpu-experts (no GPU, every expert runs on the CPU; " in caplog.text


def test_a_model_that_is_not_there_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", "/nowhere"]) == 2
    assert "--model: there is no /nowhere; check the path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("256GiB", 2**38), ("1.5 TB", 1_500_000_000_000), ("64g", 64 * 10**9), ("512", 512)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_bytes("--memory", text) == num_bytes


@pytest.mark.parametrize("text", ["lots", "-1GB", "1 PB", "GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--memory: .* write it like 256GiB"):
        parse_bytes("--memory", text)


def test_a_recording_is_in_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 48 layers of 512 experts, in int32: 94 MiB, and again while it is dumped."""
    mode = ["--expert-distribution-recorder-mode", "stat"]
    assert run(["plan", "--model", CODER_NEXT, "--memory", "256GiB", *mode]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "expert recording cpu 187.5 MiB" in shown
