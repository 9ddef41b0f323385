"""The device that shuffles finds races, and nothing but races."""

from __future__ import annotations

import pytest
import torch

from tests.device.shuffled import ShuffledDevice
from tests.native.expert_reference import run

SEEDS = range(30)


def hand_over(device, layer, inputs, *, without=()):
    """One layer's work, twice; `without` names what its author forgot."""
    x, ids, weights = inputs
    side = device.open_stream("experts")
    buffers = [device.pinned(*tensor.shape, dtype=tensor.dtype) for tensor in (*inputs, x)]
    job, back, outs = layer.job(*buffers), torch.zeros_like(x), []
    for turn in (1, 2):
        scaled = x * turn
        if "fork" not in without:
            side.wait(device.main.record())
        side.run(lambda scaled=scaled: buffers[0].copy_(scaled))
        side.run(lambda: (buffers[1].copy_(ids), buffers[2].copy_(weights)))
        side.start(job)
        if "finish" not in without:
            side.finish(job)
        side.run(lambda: back.copy_(buffers[3]))
        if "join" not in without:
            device.main.wait(side.record())
        outs.append(back.clone())
        if "memory" in without:
            scaled.fill_(0)
    return outs


def works(seed, layer, inputs, **mistake):
    expected = [run(layer, inputs[0] * turn, *inputs[1:]) for turn in (1, 2)]
    device = ShuffledDevice(seed)
    try:
        outs = hand_over(device, layer, inputs, **mistake)
        device.synchronize()
    except AssertionError:
        return False
    return all(torch.equal(out, wanted) for out, wanted in zip(outs, expected, strict=True))


def test_an_ordered_hand_over_is_right_in_every_order(layer, inputs):
    assert all(works(seed, layer, inputs) for seed in SEEDS)


@pytest.mark.parametrize("missing", ["finish", "join"])
def test_a_missing_wait_shows(layer, inputs, missing):
    assert not all(works(seed, layer, inputs, without=[missing]) for seed in SEEDS)


def test_a_buffer_that_is_used_again_too_early_shows(layer, inputs):
    assert not all(works(seed, layer, inputs, without=["join", "memory"]) for seed in SEEDS)


def two_sides(seed, *, waits):
    """The main stream writes what another reads, operation by operation."""
    device = ShuffledDevice(seed)
    side, x, seen = device.open_stream("side"), torch.zeros(1), torch.zeros(1)
    with device.stirred():
        side.run(lambda: seen.copy_(x))
        if waits:
            device.main.wait(side.record())
        x.add_(1)
        x.add_(1)
    device.synchronize()
    return seen.item()


def test_others_come_between_any_two_operations():
    assert {two_sides(seed, waits=False) for seed in SEEDS} == {0, 1, 2}
    assert {two_sides(seed, waits=True) for seed in SEEDS} == {0}


def started_early(seed, layer, inputs, *, forks):
    """The job's stream does not wait for the one that copies its input."""
    device = ShuffledDevice(seed)
    copies, jobs = device.open_stream("copies"), device.open_stream("jobs")
    host, out = (device.pinned(*inputs[0].shape, dtype=torch.float32) for _ in range(2))
    job = layer.job(host, *inputs[1:], out)
    copies.run(lambda: host.copy_(inputs[0]))
    if forks:
        jobs.wait(copies.record())
    jobs.start(job)
    jobs.finish(job)
    device.main.wait(jobs.record())
    device.synchronize()
    return torch.equal(out, run(layer, *inputs))


def test_a_job_that_starts_before_its_input_is_there_shows(layer, inputs):
    assert not all(started_early(seed, layer, inputs, forks=False) for seed in SEEDS)
    assert all(started_early(seed, layer, inputs, forks=True) for seed in SEEDS)


def test_a_job_that_is_started_while_it_is_pending_shows(layer, inputs):
    def start_twice():
        for seed in SEEDS:
            device = ShuffledDevice(seed)
            job = layer.job(*inputs, torch.empty_like(inputs[0]))
            for name in ("one", "two"):
                device.open_stream(name).start(job)
            device.synchronize()

    with pytest.raises(AssertionError, match="while it is pending"):
        start_twice()


def test_memory_that_nobody_wrote_shows():
    device = ShuffledDevice(0)
    assert device.pinned(2, dtype=torch.bfloat16).isnan().all()
    assert device.pinned(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2


def test_the_same_seed_is_the_same_order():
    def order(seed):
        device, seen = ShuffledDevice(seed), []
        streams = [device.open_stream(str(number)) for number in range(4)]
        for stream in streams * 2:
            stream.run(lambda name=stream.name: seen.append(name))
        device.synchronize()
        return "".join(seen)

    assert [order(seed) for seed in SEEDS] == [order(seed) for seed in SEEDS]
    assert len({order(seed) for seed in SEEDS}) > 10
