"""What fails between the two sides costs requests of its own step, and leaves nothing behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pkgutil import resolve_name
from unittest.mock import patch

import pytest

from kttrio.device.host import HostDevice
from kttrio.engine.scheduler import Scheduler
from kttrio.experts.feeders import Feeders
from kttrio.request import GenerateRequest, SamplingParams
from tests.device.shuffled import ShuffledDevice
from tests.experts.rings import AtOnce
from tests.runner.test_runner_update import ENGINE, Setup, cases

PLACES = (
    "kttrio.experts.streamed.grouped_mlp",
    "kttrio.experts.streamed._Group.wait",
    "kttrio.experts.streamed.Ring._fetch",
    "kttrio.experts.streamed.Ring.prefetch",
    "kttrio.experts.feeders._Staging.unpack",
    "kttrio.experts.feeders.Feeders._copy",
    "kttrio.experts.hybrid.grouped_mlp",
    "kttrio.experts.hybrid.DeviceSide.split",
    "kttrio.experts.handoff.HostSide.start",
    "kttrio.runner.passage.Passages._conclude",
)
RING = {"kt_gpu_prefill_token_threshold": 40, "kt_ring_experts": 3}


class Trouble(RuntimeError):
    pass


@contextmanager
def trouble(seed: int) -> Iterator[list[str]]:
    """Now and then one of the places raises; which ones did."""
    dice, made = random.Random(seed), []

    def troubled(place):
        work = resolve_name(place)

        def tried(*args, **named):
            if dice.random() < 0.004:
                made.append(place)
                raise Trouble(place)
            return work(*args, **named)

        return tried

    with ExitStack() as patches:
        for place in PLACES:
            patches.enter_context(patch(place, troubled(place)))
        yield made


def heard(runner, asked):
    """As many answers as prompts that arrive together: tokens, or None for one that failed."""
    scheduler, answers = Scheduler(runner.capacity, ENGINE), {}
    for number, (prompt, answer) in enumerate(asked):
        wanted = SamplingParams(len(answer), seed=0, temperature=0.0)
        answers[scheduler.submit(GenerateRequest(str(number), tuple(prompt), wanted))] = []
    while (plan := scheduler.plan()) is not None:
        try:
            events = scheduler.commit(plan, runner.step(plan))
        except Trouble as error:
            events = scheduler.fail(plan, str(error))
        for sequence, event in events:
            answers[sequence].append(event)
    assert scheduler.num_free_pages == scheduler.num_pages
    return [
        None if events[-1].error else [event.token for event in events]
        for events in answers.values()
    ]


@pytest.mark.parametrize("name", ["qwen3_next_chat", "deepseek_v32_chat"])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_answers_are_right_or_failed_and_right_again_afterwards(name, seed, tmp_path):
    """While experts change sides and long prompts pass; in any order of the device."""
    device = HostDevice() if seed is None else ShuffledDevice(seed)
    asked = cases(name)
    expected = [answer for _, answer in asked]
    at_once = partial(Feeders, threads=AtOnce())  # who shuffles has one thread
    num_failed, made = 0, []
    with (
        patch("kttrio.experts.sides.Feeders", Feeders if seed is None else at_once),
        patch("kttrio.runner.passage._SHARE", 0.0),
        patch("kttrio.runner.passage._ALONE", 0.0),
        Setup(name, placement=RING).moving(tmp_path, device=device) as runner,
    ):
        for number in range(6):
            with trouble(100 * number + (seed or 0)) as places:
                found = heard(runner, asked)
            made += places
            for answer, right in zip(found, expected, strict=True):
                num_failed += answer is None
                assert answer in (None, right)
            assert heard(runner, asked) == expected
        sides = runner._model.bank.sides
        assert not any(table.is_held for table in sides.residencies)
        assert not sides.ring.is_busy
    assert num_failed > 0
    assert len(set(made)) > 2
