"""Launch commands that people have: they start the server as they are, and nothing is hushed up."""

from __future__ import annotations

import re

import pytest

from tests.e2e.conftest import ROOT, running_server
from tests.e2e.test_operation import get, kttrio

DEMO = str(ROOT / "kttrio" / "demo")
LAUNCH = """--model DEMO --kt-weight-path DEMO --kt-cpuinfer 4096 --kt-threadpool-count 64
    --kt-num-gpu-experts 100 --kt-method FP8 --kt-gpu-prefill-token-threshold 2048
    --attention-backend triton --trust-remote-code --mem-fraction-static 0.80
    --chunked-prefill-size 16384 --max-running-requests 4 --max-total-tokens 256000
    --served-model-name Qwen3-Coder-Next --enable-mixed-chunk --tensor-parallel-size 4
    --enable-p2p-check --disable-shared-experts-fusion --disable-custom-all-reduce
    --fp8-gemm-backend cutlass --tool-call-parser qwen3_coder --kt-enable-dynamic-expert-update"""


def test_a_known_launch_command_starts_the_server() -> None:
    with running_server(*LAUNCH.replace("DEMO", DEMO).split()) as server:
        assert get(server, "/v1/models")["data"][0]["id"] == "Qwen3-Coder-Next"
        assert server.stop() == 0
    idle = " ".join(re.findall("without meaning here: (.*)", server.output))
    assert set(re.findall(r"--[\w-]+", idle)) - {"--device"} == {
        *("--kt-num-gpu-experts", "--kt-gpu-prefill-token-threshold", "--attention-backend"),
        *("--trust-remote-code", "--enable-mixed-chunk", "--enable-p2p-check"),
        *("--disable-shared-experts-fusion", "--disable-custom-all-reduce"),
        *("--fp8-gemm-backend", "--kt-enable-dynamic-expert-update"),
    }
    for reduced in (
        r"--tensor-parallel-size 4 is reduced to 1",
        r"--kt-cpuinfer 4096 is reduced to one for each core: we may use \d+ processors",
        r"--kt-threadpool-count 64 is reduced to \d+: a pool for each NUMA node",
        r"--max-total-tokens 256000 is reduced to 16384: 4 x 4096 use no more",
    ):
        assert re.search(f"WARNING .*{reduced}", server.output)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--kv-cache-dtype fp8_e5m2", "the cache keeps the precision of the model"),
        ("--nnodes 2", "kttrio runs in one process on one device"),
        ("--init-expert-location /nowhere.pt", "/nowhere.pt is no file; check the path"),
    ],
)
def test_flags_that_cannot_be_honoured_are_bad_usage(flags: str, message: str) -> None:
    ended = kttrio("serve", *flags.split())
    assert ended.returncode == 2
    assert message in ended.stderr
