"""`kttrio serve --device cpu` with launch commands of tutorials: the CPU stands in for the GPU."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Server, running_server
from tests.e2e.test_operation import get, kttrio

FIXTURES = Path(__file__).parents[1] / "fixtures"
LAUNCH = """--kt-cpuinfer 96 --kt-threadpool-count 2 --kt-method BF16 --attention-backend triton
    --trust-remote-code --mem-fraction-static 0.80 --chunked-prefill-size 16384
    --max-running-requests 4 --max-total-tokens 256000 --enable-mixed-chunk
    --tensor-parallel-size 1 --enable-p2p-check --disable-shared-experts-fusion
    --served-model-name served --device cpu"""
DYNAMIC = "--kt-num-gpu-experts 2 --kt-gpu-prefill-token-threshold 16 --kt-ring-experts 4"


@pytest.fixture
def directory() -> Path:
    return FIXTURES / "qwen3_next_chat"


def flags(directory: Path, *more: str) -> list[str]:
    return ["--model", str(directory), *LAUNCH.split(), *" ".join(more).split()]


def said(server: Server, directory: Path) -> None:
    """The server answers each chat of the checkpoint as transformers does."""
    with server.client() as client:
        for chat in json.loads((directory / "golden.json").read_text()):
            reply = client.chat.completions.create(
                model="served", messages=chat["messages"], temperature=0, max_tokens=60
            )
            content = reply.choices[0].message.content
            assert content
            assert content in chat["answer"]
            assert reply.usage is not None
            assert reply.usage.completion_tokens == len(chat["answer_ids"])


def post(server: Server, path: str) -> dict[str, Any]:
    request = urllib.request.Request(f"{server.url}{path}", method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def test_a_launch_command_and_the_start_after_it(directory: Path, tmp_path: Path) -> None:
    """With dynamic update: what was learnt by the first server is known to the second."""
    state = tmp_path / "experts.pt"
    update = f"{DYNAMIC} --kt-enable-dynamic-expert-update --kt-expert-state {state}"
    with running_server(*flags(directory, update)) as server:
        assert "served_by_device_experts" not in get(server, "/get_server_info")
        said(server, directory)
        info = get(server, "/get_server_info")
        assert post(server, "/save_expert_placement")["file"] == str(state)
        assert server.stop() == 0
    assert info["device"] == "the CPU, which stands in for a GPU"
    assert info["on device"] == "8 of 32 experts (25%), 2 a layer"
    assert info["ring"] == "4 experts on their way through the device"
    assert info["prompts"].startswith("from 16 tokens on layer by layer")
    assert info["update"].startswith("experts on the device change by what is used (decayed)")
    assert 0 < info["served_by_device_experts"] < 1
    assert info["expert_swaps"] >= 0
    idle = " ".join(re.findall("without meaning here: (.*)", server.output))
    assert "--attention-backend (a CPU has one kernel for each layer)" in idle
    assert "--kt-" not in idle
    with running_server(*flags(directory, update)) as server:
        said(server, directory)
        assert server.stop() == 0
    assert f"the experts in use are known from {state}" in server.output


@pytest.mark.parametrize(
    ("placement", "fact"),
    [
        ("--kt-gpu-experts-ratio 0.5 --kt-expert-placement-strategy random", "16 of 32"),
        ("--kt-num-gpu-experts auto", "32 of 32 experts (100%), 8 a layer"),
    ],
)
def test_answers_do_not_depend_on_the_placement(directory: Path, placement: str, fact: str) -> None:
    with running_server(*flags(directory, placement)) as server:
        said(server, directory)
        assert get(server, "/get_server_info")["on device"].startswith(fact)
        assert server.stop() == 0


def test_deferral_is_told(directory: Path) -> None:
    more = "--kt-num-gpu-experts 2 --kt-max-deferred-experts-per-token 1"
    with running_server(*flags(directory, more)) as server:
        info = get(server, "/get_server_info")
        assert server.stop() == 0
    assert info["deferred"].endswith("a layer later, which changes answers")
    assert "which changes answers" in server.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--device cuda", "--device cuda: this torch is built without CUDA"),
        ("--device cpu --kt-num-gpu-experts 99", "99 in each layer, but a layer has 8 experts"),
        ("--device cpu --kt-enable-dynamic-expert-update", "none of the 32 experts are to be on"),
        ("--device cpu --kt-max-deferred-experts-per-token 3", "a token has 2 experts"),
        (
            "--device cpu --kt-gpu-prefill-token-threshold 9 --kt-ring-experts 0",
            "give --kt-ring-experts, or a threshold of 0",
        ),
    ],
)
def test_what_cannot_work_is_refused(directory: Path, given: str, message: str) -> None:
    ended = kttrio("serve", "--model", str(directory), "--port", "0", *given.split())
    assert ended.returncode == 2
    assert message in ended.stderr
