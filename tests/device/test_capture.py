"""Graphs of the twins: what is kept, and what is refused as CUDA refuses it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kttrio.device.host import HostDevice
from tests.device.shuffled import ShuffledDevice
from tests.native.expert_reference import run

DEVICES = {"host": HostDevice, **{f"seed {n}": lambda n=n: ShuffledDevice(n) for n in range(8)}}


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def device(request):
    return request.param()


def test_a_step_on_several_streams_is_replayed(device, layer, inputs):
    """The shape of a hybrid layer: copies to the host, a job, something beside it, and back."""
    x, side = inputs[0].clone(), device.open_stream("experts")
    host, out = device.pinned(*x.shape, dtype=x.dtype), device.pinned(*x.shape, dtype=x.dtype)
    back = torch.empty_like(x)
    job = layer.job(host, *inputs[1:], out)

    def step():
        scaled = x * 3
        side.wait(device.main.record())
        side.run(lambda: host.copy_(scaled))
        side.start(job)
        side.finish(job)
        side.run(lambda: back.copy_(out))
        beside = scaled.sum(1, keepdim=True)
        device.main.wait(side.record())
        return total.copy_(back + beside)

    total = torch.empty_like(x)
    graph = device.capture(step)
    for turn in range(3):
        x.copy_(inputs[0] / (turn + 2))
        graph.replay()
        scaled = x * 3
        expected = run(layer, scaled, *inputs[1:]) + scaled.sum(1, keepdim=True)
        assert torch.equal(total, expected)
    device.synchronize()


def test_graphs_may_follow_each_other_and_plain_work(device):
    x, y = torch.zeros(2), torch.zeros(2)
    first = device.capture(lambda: x.add_(1))
    second = device.capture(lambda: y.copy_(x))
    first.replay()
    device.main.run(lambda: x.mul_(10))
    second.replay()
    first.replay()
    assert (x.tolist(), y.tolist()) == ([21, 21], [20, 20])


def test_a_failing_capture_leaves_the_device_usable(device):
    x = torch.zeros(1)
    with pytest.raises(RuntimeError, match="look at a value"):
        device.capture(x.item)
    device.synchronize()
    device.capture(lambda: x.add_(1)).replay()
    assert x.item() == 2


def test_a_stream_that_does_not_come_from_the_main_one_is_refused(device):
    side = device.open_stream("astray")
    with pytest.raises(RuntimeError, match="'astray' is given work of a captured step before"):
        device.capture(lambda: side.run(lambda: torch.zeros(1)))


def test_a_stream_that_does_not_come_back_is_refused(device):
    side = device.open_stream("astray")

    def step():
        side.wait(device.main.record())
        device.main.wait(side.record())
        side.run(lambda: torch.zeros(1))

    with pytest.raises(RuntimeError, match="does not wait for the end of 'astray'"):
        device.capture(step)


def test_a_stream_may_come_back_through_another(device):
    first, second = device.open_stream("first"), device.open_stream("second")
    x = torch.zeros(1)

    def step():
        first.wait(device.main.record())
        first.run(lambda: x.add_(1))
        second.wait(first.record())
        second.run(lambda: x.mul_(2))
        device.main.wait(second.record())

    graph = device.capture(step)
    x.zero_()
    graph.replay()
    assert x.item() == 2


def test_events_do_not_cross_the_border_of_a_graph(device):
    side, before = device.open_stream("side"), device.main.record()
    with pytest.raises(RuntimeError, match="an event that is not part of it"):
        device.capture(lambda: side.wait(before))
    inside = []
    device.capture(lambda: inside.append(device.main.record()))
    with pytest.raises(RuntimeError, match="only streams of the same captured step"):
        device.main.wait(inside[0])


@pytest.mark.parametrize("wait", ["is_done", "synchronize", "device", "capture"])
def test_a_captured_step_may_not_wait(device, wait):
    def step():
        event = device.main.record()
        if wait == "is_done":
            assert event.is_done
        elif wait == "synchronize":
            event.synchronize()
        elif wait == "device":
            device.synchronize()
        else:
            device.capture(lambda: None)

    with pytest.raises(RuntimeError, match="captured step"):
        device.capture(step)


def test_a_captured_step_starts_a_job_once(device, layer, inputs):
    """Where the host submits jobs ahead of a replay, it could not submit one twice."""
    job = device.new_job(partial(layer.job, *inputs, torch.empty_like(inputs[0])))

    def twice():
        for _ in range(2):
            device.main.start(job)
            device.main.finish(job)

    with pytest.raises(RuntimeError, match="can start a job once"):
        device.capture(twice)


def test_within_a_capture_it_is_known(device):
    seen = []
    device.capture(lambda: seen.append(device.is_capturing))
    assert seen == [True]
    assert not device.is_capturing
