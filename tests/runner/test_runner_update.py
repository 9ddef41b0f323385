"""Experts change sides under whole models, at every step: tokens and logits are what they were."""

from __future__ import annotations

import json
import random
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import pytest
import torch

from kttrio.config import (
    ConfigError,
    DeviceConfig,
    EngineConfig,
    ExpertConfig,
    ModelConfig,
    PlacementConfig,
    RecordingConfig,
    RunnerConfig,
)
from kttrio.device.host import HostDevice
from kttrio.engine.scheduler import Scheduler
from kttrio.experts.choice import Seat, StepTokens, Swap
from kttrio.experts.placement import frequency
from kttrio.experts.recording import read_counts
from kttrio.plan import Chunk, StepPlan
from kttrio.request import GenerateRequest, SamplingParams
from kttrio.runner.build import build_runner, load_runner
from kttrio.runner.device import find_machine
from kttrio.runner.planning import plan_start
from kttrio.runner.update import count_tokens
from tests.device.shuffled import ShuffledDevice
from tests.golden import FIXTURES

CHATS = sorted(path.name for path in FIXTURES.glob("*_chat"))
ENGINE = EngineConfig(
    chunked_prefill_size=48, max_running_requests=3, context_length=512, page_size=4
)


class AnyRule:
    """Swaps whatever can be swapped, again and again."""

    drops, counts = False, torch.zeros(1)

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self.shares = set()
        """How the budget was divided between the layers."""
        self.num_seen = 0
        """Choices."""

    def wants(self, step):
        return True

    def add(self, counts):
        self.num_seen += int(counts.sum())

    def choose(self, mask, limit):
        self.shares.add(tuple(mask.sum(1).tolist()))
        resident, others = mask.nonzero().tolist(), (~mask).nonzero().tolist()
        number = min(limit, len(resident), len(others))
        pairs = (self._dice.sample(seats, number) for seats in (others, resident))
        return [Swap(Seat(*up), Seat(*down)) for up, down in zip(*pairs, strict=True)]


@dataclass(frozen=True)
class Setup:
    """How a runner is built whose experts never rest."""

    name: str
    dtype: str = "bfloat16"
    method: str = "auto"
    ratio: float = 0.4
    placement: dict = field(default_factory=dict)
    recorded: str | None = None
    graphs: tuple = ()
    """Numbers of rows of captured decode steps."""

    def config(self, tmp_path, *, divided):
        placement = {}
        if divided:
            placement = {
                "kt_gpu_experts_ratio": self.ratio,
                "kt_enable_dynamic_expert_update": True,
                "kt_expert_state": tmp_path / "state.pt",
                **self.placement,
            }
        return RunnerConfig(
            model=ModelConfig(model=FIXTURES / self.name, dtype=self.dtype),
            experts=ExpertConfig(
                kt_cpuinfer=2, kt_method=self.method, kt_cache_dir=tmp_path / "cache"
            ),
            engine=ENGINE,
            device=DeviceConfig(device="cpu"),
            placement=PlacementConfig(**placement),
            recording=RecordingConfig("stat", 500, tmp_path)
            if self.recorded
            else RecordingConfig(),
        )

    @contextmanager
    def still(self, tmp_path):
        """All experts on the host."""
        runner = build_runner(self.config(tmp_path, divided=False))
        yield runner
        runner.close()

    @contextmanager
    def moving(self, tmp_path, *, seed=0, device=None):
        """Experts on both sides, swapped at random."""
        with (
            patch("kttrio.runner.build.open_device", lambda _: device or HostDevice()),
            patch("kttrio.runner.update._choose_rule", lambda *_: AnyRule(seed)),
        ):
            start = plan_start(self.config(tmp_path, divided=True), find_machine("cpu"))
            plan = replace(start.plan, graph_sizes=self.graphs)
            runner = load_runner(replace(start, plan=plan), None)
        yield runner
        runner.close()


def cases(name):
    """Prompts and the tokens that transformers answers with."""
    stored = json.loads((FIXTURES / name / "golden.json").read_text())
    return [(case["prompt_ids"], case["answer_ids"]) for case in stored]


def heard(runner, asked, **sampling):
    """The events of greedy answers to prompts that arrive together; answers are as long as those
    that are expected."""
    scheduler = Scheduler(runner.capacity, ENGINE)
    events = {}
    for number, (prompt, answer) in enumerate(asked):
        wanted = SamplingParams(len(answer), seed=0, temperature=0.0, **sampling)
        events[scheduler.submit(GenerateRequest(str(number), tuple(prompt), wanted))] = []
    while (plan := scheduler.plan()) is not None:
        for sequence, event in scheduler.commit(plan, runner.step(plan)):
            events[sequence].append(event)
    return list(events.values())


def tokens(events):
    return [[event.token for event in of_one] for of_one in events]


def residents(runner):
    """[layers, experts] bool, by the tables."""
    return torch.stack([table.mask for table in runner._model.bank.sides.residencies])


def check_sides(runner, began):
    """As many on the device as in the beginning, but other ones; nobody on both sides."""
    now, bank = residents(runner), runner._model.bank
    assert now.sum() == began.sum()
    assert not torch.equal(now, began)
    assert len(runner.updater._rule.shares) > 2, "the budget moved between layers"
    runner.updater.close()
    for layer, mask in zip(bank.host_layers, residents(runner), strict=True):
        each = layer.nbytes // max(int((~mask).sum()), 1)
        assert layer.nbytes == each * int((~mask).sum())


@pytest.mark.parametrize("name", CHATS)
def test_tokens_are_those_of_transformers(name, tmp_path):
    asked = cases(name)
    with Setup(name).moving(tmp_path) as runner:
        began = residents(runner)
        assert tokens(heard(runner, asked)) == [answer for _, answer in asked]
        assert runner.updater.num_swaps > 10
        check_sides(runner, began)


@pytest.mark.parametrize("method", ["bf16", "fp8", "int8", "int4"])
def test_logprobs_are_those_of_experts_that_stay(method, tmp_path):
    """In float32, in every format: sums come in another order, and nothing else differs."""
    setup = Setup("qwen3_moe_chat", dtype="float32", method=method)
    asked = cases(setup.name)[:2]
    with setup.still(tmp_path) as runner:
        expected = heard(runner, asked, logprobs=3, prompt_logprobs=0)
    with setup.moving(tmp_path) as runner:
        found = heard(runner, asked, logprobs=3, prompt_logprobs=0)
        assert runner.updater.num_swaps > 10
    assert tokens(found) == tokens(expected)
    torch.testing.assert_close(logprobs(found), logprobs(expected), rtol=1e-4, atol=1e-4)


def logprobs(events):
    """All of them, one after the other."""
    found = []
    for event in (event for of_one in events for event in of_one):
        found += [entry.logprob for entry in (event.prompt_logprobs or ()) if entry is not None]
        found += [event.logprob.logprob, *(value for _, value in event.logprob.top)]
    return torch.tensor(found)


@pytest.mark.parametrize("seed", range(10))
def test_no_order_of_the_device_shows(seed, tmp_path):
    """Streams are as late or early as their events allow."""
    device = ShuffledDevice(seed)
    asked = [(prompt, answer[:8]) for prompt, answer in cases("qwen3_next_chat")[:2]]
    with Setup("qwen3_next_chat").moving(tmp_path, seed=seed, device=device) as runner:
        with device.stirred():
            assert tokens(heard(runner, asked)) == [answer for _, answer in asked]
        assert runner.updater.num_swaps > 3


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_captured_steps_count_and_follow_the_tables(seed, tmp_path):
    """Every choice of a real token is seen, none of padding."""
    device = HostDevice() if seed is None else ShuffledDevice(seed)
    asked, num_tokens = [(prompt, answer[:12]) for prompt, answer in cases("qwen3_moe_chat")], 0
    setup = Setup("qwen3_moe_chat", graphs=(2, 3))
    with setup.moving(tmp_path, device=device) as runner:
        step = runner.step

        def counted(plan):
            nonlocal num_tokens
            num_tokens += plan.num_tokens
            return step(plan)

        with (
            patch.object(runner, "step", counted),
            patch.object(runner.graphs, "forward", wraps=runner.graphs.forward) as captured,
        ):
            assert tokens(heard(runner, asked)) == [answer for _, answer in asked]
        assert captured.call_count > 10
        assert runner.updater.num_swaps > 5
        if seed is None:  # nothing is under way, all was seen
            model = runner._model
            num_choices = num_tokens * model.top_k * model.num_layers
            assert runner.updater._rule.num_seen == num_choices


@pytest.mark.parametrize("name", ["qwen3_next_chat", "deepseek_v32_chat", "glm4_moe_chat"])
def test_long_prompts_pass_through_the_ring_meanwhile(name, tmp_path):
    ring = {"kt_gpu_prefill_token_threshold": 60, "kt_ring_experts": 3}
    asked = cases(name)
    with Setup(name, placement=ring).moving(tmp_path) as runner:
        began = residents(runner)
        with patch("kttrio.runner.passage._SHARE", 0.0), patch("kttrio.runner.passage._ALONE", 0.0):
            assert tokens(heard(runner, asked)) == [answer for _, answer in asked]
        assert runner._model.bank.sides.ring.num_sent > 0
        assert runner.updater.num_swaps > 0  # how many, the machine decides
        check_sides(runner, began)


@pytest.mark.parametrize("method", ["unpack_from", "pack_into", "copy_"])
def test_a_swap_that_fails_harms_no_answer(method, tmp_path, caplog):
    asked = cases("qwen3_moe_chat")[:2]
    with Setup("qwen3_moe_chat").moving(tmp_path) as runner:
        began = residents(runner)
        with patch(f"kttrio.experts.source.Matrices.{method}", side_effect=OSError("broken")):
            assert tokens(heard(runner, asked)) == [answer for _, answer in asked]
        assert torch.equal(residents(runner), began)
    assert caplog.text.count("stay as they are from now on") == 1


def test_who_is_on_the_device_is_recorded_step_by_step(tmp_path):
    """Masks change with the swaps; layers without experts are all true."""
    setup = Setup(
        "deepseek_v3_chat", placement={"record_kt_gpu_expert_distribution": True}, recorded="stat"
    )
    with setup.moving(tmp_path) as runner:
        began, recorder = residents(runner), runner.recorder
        recorder.start()
        heard(runner, cases(setup.name)[:2])
        num_steps, now = recorder.num_kept, residents(runner)
        recorder.dump()
    (file,) = tmp_path.glob("gpu_expert_distribution_*.pt")
    masks = torch.load(file, weights_only=True)["gpu_expert_masks"]
    assert masks.shape == (num_steps, 3, 8)
    assert masks[:, 0].all()
    assert torch.equal(masks[0, 1:], began)
    assert set(masks[:, 1:].sum((1, 2)).tolist()) == {int(began.sum())}
    changed = (masks[1:] != masks[:-1]).any(2).any(1)
    assert changed.sum() > 5
    assert not torch.equal(masks[-1, 1:], began)
    assert (masks[-1, 1:] != now).sum() <= 2 * 4, "but for the last swaps"


def test_a_recording_may_be_stopped_within_any_step(tmp_path):
    """That step is not recorded, and goes on as if it had not been going to be."""
    setup, asked = Setup("qwen3_moe_chat", graphs=(2, 3), recorded="stat"), cases("qwen3_moe_chat")
    with setup.moving(tmp_path) as runner:
        recorder, forward = runner.recorder, runner._forward

        def interrupted(batch):
            recorder.stop()
            hidden = forward(batch)
            recorder.start()
            return hidden

        recorder.start()
        with patch.object(runner, "_forward", interrupted):
            assert tokens(heard(runner, asked)) == [answer for _, answer in asked]
        assert recorder.num_kept == 0


@pytest.mark.parametrize("place", ["", "file/state.pt"])
def test_a_state_that_could_not_be_kept_is_refused_at_the_start(place, tmp_path):
    (tmp_path / "file").touch()
    placement = {"kt_expert_state": tmp_path / place}
    config = Setup("qwen3_moe_chat", placement=placement).config(tmp_path, divided=True)
    with pytest.raises(ConfigError, match="--kt-expert-state"):
        build_runner(config)


def test_a_restart_begins_with_those_in_use(tmp_path):
    """What one run has learnt decides the placement of the next."""
    setup = Setup("qwen3_moe_chat", ratio=0.25)
    config = setup.config(tmp_path, divided=True)
    runner = build_runner(config)
    began = residents(runner)
    heard(runner, cases(setup.name))
    runner.close()
    known = read_counts(config.placement.kt_expert_state)[0]
    assert known.sum() > 0
    runner = build_runner(config)
    now = residents(runner)
    assert torch.equal(now, frequency(known, int(began.sum())))
    assert not torch.equal(now, began)
    runner.close()


def chunk(length, *, start=0, num_prompt=100):
    sampling = SamplingParams(1, seed=0)
    return Chunk(0, start, tuple(range(length)), (), sampling, True, num_prompt)


def test_prompts_are_told_from_answers():
    chunks = chunk(100), chunk(7, start=95), chunk(1, start=100), chunk(3, start=120)
    assert count_tokens(StepPlan(chunks)) == StepTokens(111, 105)
    assert count_tokens(StepPlan(chunks[:1], chunk(50))) == StepTokens(150, 150)
