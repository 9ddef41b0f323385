"""The CPU that stands in for the device."""

from __future__ import annotations

import threading

import pytest
import torch

from kttrio.device.host import HostDevice
from kttrio.native import NativeError
from tests.native.expert_reference import run


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


def fail() -> None:
    raise ArithmeticError("of the work")


def test_work_is_done_at_once_where_nothing_is_waited_for(device):
    seen = []
    side = device.open_stream("side")
    for stream in (device.main, side, device.main):
        stream.run(lambda: seen.append(len(seen)))
    side.wait(device.main.record())
    side.run(lambda: seen.append(len(seen)))
    assert seen == [0, 1, 2, 3]


def test_a_job_runs_beside_the_main_stream(device, layer, inputs):
    """What comes after the job stays until somebody waits for it: nothing blocks before."""
    side = device.open_stream("side")
    ready = torch.zeros(1, dtype=torch.int32)
    out, back = torch.empty_like(inputs[0]), torch.zeros_like(inputs[0])
    job = layer.job(*inputs, out, ready=ready)
    side.start(job)
    side.finish(job)
    side.run(lambda: back.copy_(out))
    event = side.record()
    device.main.run(lambda: ready.fill_(1))  # would never come if the job had been waited for
    assert not back.any()
    device.main.wait(event)
    assert torch.equal(back, run(layer, *inputs))
    job.wait()


def test_the_main_stream_waits_for_the_job_it_finishes(device, layer, inputs):
    out = torch.empty_like(inputs[0])
    job = layer.job(*inputs, out)
    device.main.start(job)
    device.main.finish(job)
    assert torch.equal(out, run(layer, *inputs))


@pytest.mark.parametrize("forced_by", ["wait", "is_done", "synchronize", "third", "device"])
def test_what_stays_is_done_by_whoever_waits(device, layer, inputs, forced_by):
    first, second = device.open_stream("first"), device.open_stream("second")
    seen = []
    job = layer.job(*inputs, torch.empty_like(inputs[0]))
    first.start(job)
    first.finish(job)
    first.run(lambda: seen.append("first"))
    second.wait(first.record())
    second.run(lambda: seen.append("second"))
    event = second.record()
    second.run(lambda: seen.append("later"))
    assert seen == []
    if forced_by == "wait":
        device.main.wait(event)
    elif forced_by == "is_done":
        assert event.is_done
    elif forced_by == "synchronize":
        event.synchronize()
    elif forced_by == "third":
        third = device.open_stream("third")
        third.wait(event)
        third.record().synchronize()
    else:
        device.synchronize()
    assert seen == ["first", "second"] + ["later"] * (forced_by == "device")


def test_work_that_fails_at_once_tells_at_once(device):
    for stream in (device.main, device.open_stream("side")):
        with pytest.raises(ArithmeticError, match="of the work"):
            stream.run(fail)
    device.synchronize()


@pytest.mark.parametrize("told_by", ["wait", "synchronize", "device"])
def test_work_that_fails_later_tells_whoever_waits_and_only_once(device, layer, inputs, told_by):
    side, seen = device.open_stream("side"), []
    job = layer.job(*inputs, torch.empty_like(inputs[0]))
    side.start(job)
    side.finish(job)
    side.run(fail)
    side.run(lambda: seen.append("after"))
    event = side.record()
    wait = {
        "wait": lambda: device.main.wait(event),
        "synchronize": event.synchronize,
        "device": device.synchronize,
    }[told_by]
    with pytest.raises(ArithmeticError):
        wait()
    assert seen == ["after"]
    wait()
    device.synchronize()


def test_a_failure_passes_through_the_streams_that_wait(device, layer, inputs):
    first, second = device.open_stream("first"), device.open_stream("second")
    job = layer.job(*inputs, torch.empty_like(inputs[0]))
    first.start(job)
    first.finish(job)
    first.run(fail)
    second.wait(first.record())
    with pytest.raises(ArithmeticError):
        second.record().synchronize()


def test_what_goes_wrong_in_a_job_is_told_by_it_or_by_the_device(device, layer, inputs):
    layer.clear_expert(1)
    side = device.open_stream("side")
    job = layer.job(*inputs, torch.empty_like(inputs[0]))
    for told_by in (job.wait, device.check_jobs, device.synchronize):
        side.start(job)
        side.finish(job)
        side.record().synchronize()  # the order goes on
        with pytest.raises(NativeError, match="that expert has no weights"):
            told_by()
        device.synchronize()


def test_a_job_that_is_closed_is_forgotten(device, layer, inputs):
    job = layer.job(*inputs, torch.empty_like(inputs[0]))
    device.main.start(job)
    job.close()
    device.synchronize()


def test_a_job_is_not_started_again_before_its_end(device, layer, inputs):
    ready = torch.zeros(1, dtype=torch.int32)
    job = layer.job(*inputs, torch.empty_like(inputs[0]), ready=ready)
    device.main.start(job)
    with pytest.raises(NativeError, match="pending"):
        device.main.start(job)
    ready.fill_(1)
    device.synchronize()


def test_work_that_stays_may_write_tensors_of_inference(device, layer, inputs):
    side = device.open_stream("side")
    job = layer.job(*inputs, torch.empty_like(inputs[0]))
    with torch.inference_mode():
        made = torch.zeros(3)
        side.start(job)
        side.finish(job)
        side.run(lambda: made.add_(1))
    device.synchronize()
    assert made.tolist() == [1, 1, 1]


def test_pinned_memory_is_the_hosts(device):
    made = device.pinned(2, 3, dtype=torch.bfloat16)
    assert (made.shape, made.dtype, made.device) == ((2, 3), torch.bfloat16, device.where)


def test_work_keeps_its_order_though_another_thread_does_what_came_before(device, layer, inputs):
    """The one that waits is in the middle of the last call when the next one is given."""
    side, other = device.open_stream("side"), device.open_stream("other")
    begun, may_end, seen = threading.Event(), threading.Event(), []
    job = layer.job(*inputs, torch.empty_like(inputs[0]))
    other.start(job)
    other.finish(job)
    side.wait(other.record())

    def slow():
        begun.set()
        may_end.wait(10)
        seen.append("first")

    side.run(slow)
    waits = threading.Thread(target=side.record().synchronize)
    waits.start()
    begun.wait(10)
    gives = threading.Thread(target=side.run, args=(lambda: seen.append("second"),))
    gives.start()
    gives.join(0.1)
    may_end.set()
    for thread in (waits, gives):
        thread.join(10)
    device.synchronize()
    assert seen == ["first", "second"]
