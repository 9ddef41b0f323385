from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kttrio.config import ConfigError, EngineConfig, ExpertConfig, ModelConfig, RunnerConfig
from kttrio.plan import Chunk, StepPlan
from kttrio.request import SamplingParams
from kttrio.runner.build import build_runner

FIXTURES = Path(__file__).parents[1] / "fixtures"
ENGINE = EngineConfig(
    chunked_prefill_size=64, max_running_requests=4, context_length=64, page_size=4
)


def build(name="qwen3_next", engine=ENGINE, **hooks):
    model = ModelConfig(model=FIXTURES / name, dtype="float32")
    return build_runner(RunnerConfig(model, ExpertConfig(kt_cpuinfer=2), engine), **hooks)


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_next_fp8"])
def checkpoint(request):
    return request.param


@pytest.fixture(scope="module")
def golden(checkpoint):
    tensors = load_file(FIXTURES / checkpoint / "golden.safetensors")
    return tuple(tensors["input_ids"].tolist()), tensors["logits"].log_softmax(-1)


@pytest.fixture(scope="module")
def runner(checkpoint):
    runner = build(checkpoint)
    yield runner
    runner.close()


def part(slot, token_ids, start, end, **sampling):
    params = SamplingParams(**{"max_tokens": 8, "seed": 3, "temperature": 0.0, **sampling})
    pages = tuple(range(slot * 16, slot * 16 + -(-end // 4)))
    sample = end == len(token_ids)
    return Chunk(slot, start, token_ids[start:end], pages, params, sample, len(token_ids))


@pytest.mark.parametrize("cuts", [(41,), (1, 20, 1, 19), (13, 13, 15)])
def test_prompt_scores_equal_the_golden_logits(runner, golden, cuts):
    token_ids, expected = golden
    found, start = [], 0
    for size in cuts:
        chunk = part(1, token_ids, start, start + size, prompt_logprobs=2)
        (result,) = runner.step(StepPlan((chunk,))).chunks
        found += result.prompt_logprobs
        start += size
    assert [entry.token for entry in found] == list(token_ids[1:])
    for row, entry in zip(expected, found, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-3)
        assert [value for _, value in entry.top] == pytest.approx(
            row.topk(2).values.tolist(), abs=1e-3
        )
    assert result.tokens[0] == int(expected[-1].argmax())


def test_sequences_of_one_step_do_not_touch_each_other(runner, golden):
    token_ids, expected = golden
    wanted = [5, 41, 1, 17]
    chunks = [part(slot, token_ids[:end], 0, end) for slot, end in enumerate(wanted)]
    results = runner.step(StepPlan(tuple(chunks))).chunks
    assert [result.tokens[0] for result in results] == [
        int(expected[end - 1].argmax()) for end in wanted
    ]


def test_chunk_borders_do_not_show_in_bfloat16_either(golden, checkpoint):
    """How far bfloat16 is from float32 is the model's business, and tested there."""
    token_ids, _ = golden
    model = ModelConfig(model=FIXTURES / checkpoint, dtype="bfloat16")
    runner = build_runner(RunnerConfig(model, ExpertConfig(kt_cpuinfer=2), ENGINE))
    whole, parts = [], []
    for found, cuts in ((whole, (41,)), (parts, (10, 31))):
        for end, size in zip(itertools.accumulate(cuts), cuts, strict=True):
            chunk = part(1, token_ids, end - size, end, prompt_logprobs=0)
            found += runner.step(StepPlan((chunk,))).chunks[0].prompt_logprobs
    runner.close()
    differences = [abs(a.logprob - b.logprob) for a, b in zip(whole, parts, strict=True)]
    assert len(differences) == 40
    assert sum(differences) / 40 < 0.01


def test_the_facts_say_what_was_decided(runner):
    assert runner.facts["sequences"] == "4 at a time, each up to 64 tokens"
    assert runner.facts["precision"].startswith("float32, experts ")
    assert runner.facts["activations"] == "float32 in the experts"
    assert runner.facts["threads"] == 2


def test_the_plan_is_told_before_anything_is_read():
    heard = []
    runner = build(
        on_plan=lambda plan: heard.append(plan),
        progress=lambda done, total: heard.append((done, total)),
    )
    plan, *bytes_read = heard
    capacity = runner.capacity
    runner.close()
    assert bytes_read[-1][0] == bytes_read[-1][1] > 0
    assert capacity.num_slots == plan.num_slots == 4
    assert capacity.num_pages == plan.num_pages == 4 * 16
    assert (capacity.page_size, capacity.context_length) == (4, 64)
    assert (capacity.max_step_tokens, capacity.vocab_size) == (64, 256)


@pytest.mark.parametrize(
    ("limits", "note", "context"),
    [
        ({"max_total_tokens": 1000}, r"made for 4096 tokens, but the KV cache holds 1000", 1000),
        ({"context_length": 5000}, r"--context-length 5000 is more than .*; it is 4096", 4096),
        ({"context_length": 64}, "", 64),
        ({}, "", 4096),
    ],
)
def test_a_context_that_is_not_what_one_thinks_is_noted(caplog, limits, note, context):
    engine = EngineConfig(**{"max_running_requests": 1, "page_size": 4, **limits})
    with caplog.at_level("WARNING"):
        runner = build(engine=engine)
    runner.close()
    assert runner.capacity.context_length == context
    assert bool(caplog.records) == bool(note)
    assert re.search(note, caplog.text)


@pytest.mark.parametrize(
    ("limits", "note"),
    [
        ({"max_total_tokens": 10**6}, "--max-total-tokens 1000000 is reduced to 4096: 1 x 4096 "),
        (
            {"max_total_tokens": 4096, "memory": 20},
            r"--max-total-tokens 4096 is reduced to \d+: no more fits into .* 0.8 of 20.0 MiB",
        ),
        (
            {"chunked_prefill_size": 2**14, "memory": 40},
            r"--chunked-prefill-size 16384 is reduced to \d+: no more fits",
        ),
    ],
)
def test_what_the_plan_reduces_is_noted(caplog, monkeypatch, limits, note):
    memory = limits.pop("memory", 2**10)
    monkeypatch.setattr("kttrio.runner.device.available_memory", lambda: memory << 20)
    defaults = {"max_running_requests": 1, "page_size": 4, "chunked_prefill_size": 64}
    build(engine=EngineConfig(**(defaults | limits))).close()
    assert re.search(note, caplog.text)


def test_what_does_not_fit_is_refused_before_anything_is_read():
    def progress(done, total):
        raise AssertionError("nothing may be read")

    with pytest.raises(ConfigError, match="the model does not fit"):
        build(engine=EngineConfig(mem_fraction_static=1e-9), progress=progress)


def test_a_missing_model_is_a_config_error():
    with pytest.raises(ConfigError, match="--model"):
        build_runner(RunnerConfig())


def test_a_small_model_keeps_torch_to_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        build().close()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
