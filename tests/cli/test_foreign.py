"""Launch commands of other servers: taken, named, or refused with the mend."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from kttrio.cli.flags import flag_name, parse_flags
from kttrio.cli.foreign import FOREIGN, foreign_notes, name_idle
from kttrio.cli.serve import RECORDS as OURS
from kttrio.config import ConfigError

# Launch commands as the tutorials of KTransformers print them, without paths.
CODER_NEXT = """--kt-cpuinfer 96 --kt-threadpool-count 2 --kt-num-gpu-experts 100 --kt-method FP8
    --kt-gpu-prefill-token-threshold 2048 --attention-backend triton --trust-remote-code
    --mem-fraction-static 0.80 --chunked-prefill-size 16384 --max-running-requests 4
    --max-total-tokens 256000 --served-model-name Qwen3-Coder-Next --enable-mixed-chunk
    --tensor-parallel-size 1 --enable-p2p-check --disable-shared-experts-fusion
    --disable-custom-all-reduce --fp8-gemm-backend cutlass --tool-call-parser qwen3_coder
    --kt-enable-dynamic-expert-update"""
DEEPSEEK = """--host 0.0.0.0 --port 30000 --kt-cpuinfer 60 --kt-threadpool-count 2
    --kt-num-gpu-experts 1 --attention-backend triton --trust-remote-code
    --mem-fraction-static 0.98 --chunked-prefill-size 4096 --max-running-requests 32
    --max-total-tokens 40000 --served-model-name DeepSeek-V3.2 --enable-mixed-chunk
    --tensor-parallel-size 1 --enable-p2p-check --disable-shared-experts-fusion
    --kt-method AMXINT4"""
SCHEDULING = """--kt-num-gpu-experts 8 --kt-expert-placement-strategy frequency
    --init-expert-location /path/to/activation_stats.pt --kt-enable-dynamic-expert-update
    --kt-gpu-prefill-token-threshold 512 --record-kt-gpu-expert-distribution
    --expert-distribution-recorder-mode stat"""
OFTEN_ADDED = """--context-length 32768 --kv-cache-dtype auto --page-size 64 --schedule-policy lpm
    --api-key key --enable-metrics --watchdog-timeout 3000 --disable-radix-cache
    --cuda-graph-max-bs 4 --cuda-graph-bs 1 2 4 --disable-cuda-graph --random-seed 1
    --stream-interval 2 --max-prefill-tokens 16384 --tp 1 --dp-size 1 --device cpu
    --load-format safetensors --speculative-eagle-topk 1 --speculative-num-steps 3
    --kt-numa-nodes 0 1"""
COMMANDS = (CODER_NEXT, DEEPSEEK, SCHEDULING, OFTEN_ADDED)


def parse(text: str) -> tuple[Any, ...]:
    return parse_flags("kttrio serve", "Serve.", text.split(), (*OURS, FOREIGN))


def idle(text: str) -> str:
    *_, foreign = parse(text)
    return name_idle(foreign)


def named(text: str) -> set[str]:
    return {word.strip(",;") for word in idle(text).split() if word.startswith("--")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_a_setting_or_named_or_says_what_holds_anyway(command: str) -> None:
    ours = {flag_name(item.name) for record in OURS for item in fields(record)}
    fixed = {flag_name(item.name) for item in fields(FOREIGN) if "why" not in item.metadata}
    given = {word for word in command.split() if word.startswith("--")}
    assert named(command) == given - ours - fixed


@pytest.mark.parametrize(
    ("text", "num_drafts"),
    [
        ("", 0),
        ("--speculative-num-draft-tokens 3", 0),
        ("--speculative-algorithm MTP", 1),
        ("--speculative-algorithm eagle --speculative-num-draft-tokens 4", 4),
        ("--speculative-algorithm NEXTN --speculative-num-draft-tokens 8", 8),
    ],
)
def test_drafts_of_the_checkpoints_own_layer_have_three_names(text: str, num_drafts: int) -> None:
    engine = parse(text)[2]
    assert engine.num_drafts == num_drafts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--speculative-algorithm EAGLE3", "own layer"),
        ("--speculative-num-draft-tokens 0", "the least is 1"),
        ("--speculative-num-draft-tokens 9", "the most is 8"),
    ],
)
def test_other_drafts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_the_line_gives_the_reasons_once() -> None:
    line = idle("--mamba-backend triton --enable-p2p-check --fp8-gemm-backend cutlass")
    assert line == (
        "--mamba-backend, --fp8-gemm-backend (there is one kernel for each layer); "
        "--enable-p2p-check (one process, one device)"
    )
    assert idle("--port 1 --kt-cpuinfer 3") == ""


def test_more_devices_than_one_are_reduced_aloud() -> None:
    *_, foreign = parse("--tp 4 --ep-size 1 --enable-p2p-check")
    assert list(foreign_notes(foreign)) == [
        "without meaning here: --enable-p2p-check (one process, one device)",
        "--tp 4 is reduced to 1: one process, one device",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--nnodes 4", "--nnodes: '4' is not 1; kttrio runs in one process on one device"),
        ("--tp-size four", "--tp-size: 'four' is not a whole number"),
        ("--kv-cache-dtype fp8_e5m2", "--kv-cache-dtype: 'fp8_e5m2' is none of auto, bf16, "),
        ("--quantization w8a8_int8", "or quantise the experts with --kt-method"),
        ("--load-format dummy", "only safetensors files are read"),
        ("--speculative-draft-model-path /eagle", "--speculative-algorithm MTP alone"),
        ("--speculative-eagle-topk 4", "drafts are a chain, not a tree"),
        ("--enable-lora", "--enable-lora: adapters are not supported"),
        ("--lora-paths a=/x b=/y", "--lora-paths: adapters are not supported; merge them into"),
        ("--device xpu", "there are no kernels for another device"),
        ("--attention-backend flashh", "'flashh' is none of triton, torch"),
        ("--cuda-graph-bs 1 0", "--cuda-graph-bs: 0 is too small"),
        ("--kt-num-gpu-experts many", "'many' is not a whole number or auto"),
        ("--atention-backend triton", "did you mean --attention-backend?"),
        ("--trust-remote-code=yes", "--trust-remote-code: ignored explicit argument 'yes'"),
        ("--no-trust-remote-code", "unknown flag --no-trust-remote-code"),
        ("--attention-backend", "--attention-backend: expected a value"),
        ("--enable-double-sparsity", "unknown flag --enable-double-sparsity"),
    ],
)
def test_what_would_change_answers_is_refused(argv: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert message in str(caught.value)


def test_no_flag_is_ours_and_foreign() -> None:
    names = [item.name for record in (*OURS, FOREIGN) for item in fields(record)]
    assert len(names) == len(set(names))


def test_help_is_not_drowned_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--enable-p2p-check" not in capsys.readouterr().out
