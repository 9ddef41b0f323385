"""From flags to a recording of whole models, compared with what the experts themselves count."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from kttrio.config import (
    ConfigError,
    EngineConfig,
    ExpertConfig,
    ModelConfig,
    RecordingConfig,
    RunnerConfig,
)
from kttrio.engine.scheduler import Scheduler
from kttrio.experts.recording import read_counts
from kttrio.plan import Chunk, StepPlan
from kttrio.request import GenerateRequest, SamplingParams
from kttrio.runner.build import build_runner
from kttrio.runner.recording import describe, make_directory, recorder_settings
from kttrio.runner.runner import Runner

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODES = ("stat", "stat_approx", "per_pass", "per_token")
ENGINE = {
    "chunked_prefill_size": 16,
    "max_running_requests": 4,
    "context_length": 64,
    "page_size": 4,
    "speculative_num_draft_tokens": 2,
}


def settings(mode: str | None = "stat", size: int | None = None, directory: Path | None = None):
    return RecordingConfig(mode, size, directory)


def build(name: str, recording: RecordingConfig, **engine):
    return build_runner(
        RunnerConfig(
            ModelConfig(model=FIXTURES / name, dtype="float32"),
            ExpertConfig(kt_cpuinfer=2),
            EngineConfig(**{**ENGINE, **engine}),
            recording=recording,
        )
    )


def run(runner, num_prompts=3) -> int:
    """Prompts of several lengths in chunks, and their answers; how many tokens were computed."""
    scheduler, num_tokens = Scheduler(runner.capacity, EngineConfig(**ENGINE)), 0
    for number in range(num_prompts):
        prompt = tuple((7 * number + 5 * i) % 50 for i in range(3 + 9 * number))
        sampling = SamplingParams(6 + number, seed=1, temperature=0.0)
        scheduler.submit(GenerateRequest(str(number), prompt, sampling))
    while (plan := scheduler.plan()) is not None:
        num_tokens += plan.num_tokens
        result = runner.step(plan)
        num_tokens += len(plan.long.token_ids) if plan.long and result.long else 0
        scheduler.commit(plan, result)
    return num_tokens


def tally(model) -> torch.Tensor:
    """[layers, experts] int64: how often each expert is asked to compute from now on. Without rows
    for dense layers, but with one for the layer that drafts."""
    counts = torch.zeros(len(model.bank.layers), model.num_experts, dtype=torch.int64)
    for experts, row in zip(model.bank.layers, counts, strict=True):

        def forward(x, routing, *others, compute=experts.forward, row=row):
            row += torch.bincount(routing.ids.flatten(), minlength=len(row))
            return compute(x, routing, *others)

        experts.forward = forward
    return counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "algorithm", "dense"),
    [
        ("qwen3_next_chat", None, 0),
        ("qwen3_next_chat", "MTP", 0),
        ("deepseek_v3_chat", None, 1),
        ("deepseek_v3_chat", "MTP", 1),
    ],
)
def test_recorded_is_what_the_experts_counted(tmp_path, mode, name, algorithm, dense):
    """Ragged steps, dense layers first, and drafts: refused ones count, their layer does not."""
    runner = build(name, settings(mode, 100, tmp_path), speculative_algorithm=algorithm)
    model, recorder = runner._model, runner.recorder
    counted = tally(model)
    recorder.start()
    num_tokens = run(runner)
    found = read_counts(recorder.dump()).sum(0)
    assert found.shape == (model.num_layers, model.num_experts)
    assert found[:dense].sum() == 0
    assert torch.equal(found[dense:], counted[: model.num_layers - dense])
    assert found[dense:].sum(1).tolist() == [num_tokens * model.top_k] * (model.num_layers - dense)
    runner.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_long_prompt_is_recorded_as_one_step_more(tmp_path, mode):
    """Its choices are those that its chunks make, in the same order, whatever runs beside it."""
    chunked = build("deepseek_v3_chat", settings(mode, 100, tmp_path / "chunked"))
    passing = build("deepseek_v3_chat", settings(mode, 100, tmp_path / "passing"))
    found = []
    for runner in (chunked, passing):
        recorder = runner.recorder
        if runner is passing:
            runner = with_long(runner)
        recorder.start()
        with patch("kttrio.runner.passage._SHARE", 0.0):
            num_tokens = run(runner, num_prompts=4)
        found.append(recorder.dump())
    counts = [read_counts(path).sum(0) for path in found]
    assert torch.equal(*counts)
    assert counts[0][1:].sum(1).tolist() == [num_tokens * passing._model.top_k] * 2
    if mode == "per_token":
        by_tokens = [choices_by_place(path) for path in found]
        assert by_tokens[0] == by_tokens[1]
    chunked.close()
    passing.close()


def choices_by_place(path):
    """(token, position, experts in all layers), sorted: steps differ, what they choose does not."""
    rows = []
    for record in torch.load(path, weights_only=True)["records"]:
        ids = record["topk_ids_of_layer"].transpose(0, 1).flatten(1).tolist()
        rows += zip(record["input_ids"], record["positions"], ids, strict=True)
        assert sum(record["extend_seq_lens"]) == len(ids)
    return sorted(rows)


def test_a_passage_counts_where_it_began_and_ended_while_recording(tmp_path):
    runner = build("qwen3_next_chat", settings("stat", 100, tmp_path))
    recorder, passing = runner.recorder, with_long(runner)
    prompt = tuple(range(1, 31))
    sampling = SamplingParams(1, seed=1, temperature=0.0)
    long = Chunk(0, 0, prompt, tuple(range(8)), sampling, True, 30)
    with patch("kttrio.runner.passage._ALONE", 0.0):
        for commands in ({}, {0: "start"}, {3: "start"}, {0: "start", 3: "stop"}):
            kept = passage_under(passing, recorder, long, commands)
            assert kept == (commands == {0: "start"})
        recorder.start()
        passing.step(StepPlan((), long))
        passing.step(StepPlan((long._replace(slot=1),)))  # which drops the one under way
        assert recorder.num_kept == 1
    runner.close()


def passage_under(runner, recorder, long, commands) -> int:
    """Steps that are kept of a passage with commands before its steps."""
    recorder.stop()
    for number in range(1000):
        if number in commands:
            getattr(recorder, commands[number])()
        if runner.step(StepPlan((), long)).long is not None:
            return recorder.num_kept
    raise AssertionError("it never ends")


def with_long(runner):
    capacity = replace(runner.capacity, long_tokens=12, max_long_tokens=30)
    return Runner(
        runner._model,
        runner._caches,
        capacity=capacity,
        device=torch.device("cpu"),
        recorder=runner.recorder,
    )


def test_answers_do_not_change(tmp_path):
    def tokens(recording):
        runner = build("qwen3_next_chat", recording)
        if runner.recorder is not None:
            runner.recorder.start()
        scheduler = Scheduler(runner.capacity, EngineConfig(**ENGINE))
        prompt = tuple(range(3, 20))
        scheduler.submit(GenerateRequest("r", prompt, SamplingParams(12, seed=1, temperature=0.0)))
        drawn = []
        while (plan := scheduler.plan()) is not None:
            events = scheduler.commit(plan, runner.step(plan))
            drawn += [event.token for _, event in events]
        runner.close()
        return drawn

    assert tokens(settings("per_token", -1, tmp_path)) == tokens(settings(None))


def test_without_a_mode_nothing_listens():
    runner = build("qwen3_next_chat", settings(None))
    assert runner.recorder is None
    assert "recording" not in runner.facts
    assert not any(block.listeners for block in runner._model.moe_blocks().values())
    runner.close()


def test_the_operator_reads_what_is_recorded(tmp_path):
    runner = build("qwen3_next_chat", settings("stat", None, tmp_path))
    assert runner.facts["recording"] == (
        f"stat of the last 1000 steps between start and stop, dumped to {tmp_path}"
    )
    runner.close()


def test_sizes(tmp_path):
    assert recorder_settings(settings(directory=tmp_path)).num_steps == 1000
    assert recorder_settings(settings(size=7, directory=tmp_path)).num_steps == 7
    every = recorder_settings(settings(size=-1, directory=tmp_path))
    assert every.num_steps is None
    assert describe(every).startswith("stat of all steps, with no bound on their memory, between")
    with pytest.raises(ConfigError, match="buffer-size 0 keeps nothing; give a number of steps"):
        recorder_settings(settings(size=0, directory=tmp_path))


def test_what_is_given_without_a_mode_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        assert recorder_settings(settings(None, 5, Path("there"))) is None
        assert recorder_settings(settings(None)) is None
    size, directory = (record.getMessage() for record in caplog.records)
    assert "buffer-size 5 has no effect without --expert-distr" in size
    assert "recorder-dir there has no effect without --expert-distr" in directory


def test_the_answer_names_a_file_that_clients_find(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recorder_settings(settings(directory=Path("there"))).directory == tmp_path / "there"


def test_a_step_without_a_finite_logit_is_not_recorded(tmp_path):
    runner = build("qwen3_next_chat", settings("stat", 10, tmp_path))
    runner.recorder.start()
    scale = runner._model.norm.weight
    intact = scale.clone()
    scale.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        run(runner, num_prompts=1)
    assert runner.recorder.num_kept == 0
    scale.copy_(intact)
    run(runner, num_prompts=1)
    assert runner.recorder.num_kept > 0
    runner.close()


def test_the_directory_is_made_before_anything_is_loaded(tmp_path):
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"recorder-dir .*/file: .*exists"):
        build("qwen3_next_chat", settings(directory=tmp_path / "file"))


def test_a_directory_that_takes_no_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="we may not write there; name another"):
        make_directory(tmp_path)


def test_files_go_to_tmp_where_nothing_is_said():
    assert recorder_settings(settings()).directory == Path("/tmp")
