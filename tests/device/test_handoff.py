"""Both ways from a stream to a job and back, with a driver that calls at once and kernels in
Triton's interpreter."""

from __future__ import annotations

import ctypes
import threading
from functools import partial

import pytest
import torch

from kttrio.device import handoff
from kttrio.device.handoff import FlagMessenger, HostFunctionMessenger
from kttrio.native import NativeError, host_functions
from tests.native.expert_reference import run

STREAM = 77


class CallingDriver:
    """Does at once what a stream would do when it comes to it."""

    def __init__(self):
        self.calls = []

    def launch_host_function(self, stream, function, argument):
        self.calls.append((stream, function))
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)


@pytest.fixture
def driver():
    return CallingDriver()


@pytest.fixture(params=["host-function", "flags"])
def messenger(request, driver):
    if request.param == "flags":
        pytest.importorskip("triton", reason="kernels need Triton: pip install triton")
        return FlagMessenger(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return HostFunctionMessenger(driver, host_functions())


@pytest.fixture
def flags():
    pytest.importorskip("triton", reason="kernels need Triton: pip install triton")
    if torch.cuda.is_available():
        pytest.skip("for the interpreter: a GPU would start its kernels later")
    return FlagMessenger(torch.device("cpu"))


def test_a_job_is_started_and_waited_for_again_and_again(messenger, layer, inputs):
    out = torch.empty_like(inputs[0])
    job = messenger.new_job(partial(layer.job, *inputs, out))
    for _ in range(3):
        inputs[0].mul_(0.5)
        messenger.start(job, STREAM, captured=False)
        messenger.finish(job, STREAM)
        assert torch.equal(out, run(layer, *inputs))
    job.wait()


def test_what_goes_wrong_is_told_by_the_job_and_holds_up_nobody(messenger, layer, inputs):
    job = messenger.new_job(partial(layer.job, *inputs, torch.empty_like(inputs[0])))
    layer.clear_expert(1)
    messenger.start(job, STREAM, captured=False)
    messenger.finish(job, STREAM)
    with pytest.raises(NativeError, match="that expert has no weights"):
        job.wait()


def test_host_functions_get_the_stream_and_the_handle(driver, layer, inputs):
    functions = host_functions()
    messenger = HostFunctionMessenger(driver, functions)
    job = messenger.new_job(partial(layer.job, *inputs, torch.empty_like(inputs[0])))
    messenger.start(job, STREAM, captured=True)
    messenger.finish(job, STREAM)
    messenger.expect([job])  # says nothing to the job
    assert driver.calls == [(STREAM, functions.submit), (STREAM, functions.wait)]


def test_a_captured_start_only_announces(flags, layer, inputs):
    """A replay is: the jobs are submitted, then the stream announces and waits."""
    out = torch.empty_like(inputs[0])
    job = flags.new_job(partial(layer.job, *inputs, out))
    for turn in range(3):
        inputs[0].mul_(0.5)
        flags.expect([job])
        with pytest.raises(NativeError, match="pending"):
            job.submit()  # it waits for its stream
        if turn == 1:  # a replay's own: no Python of the capture runs then
            flags._flags[job].count.add_(1)
            flags._flags[job].ready.copy_(flags._flags[job].count)
        else:
            flags.start(job, STREAM, captured=True)
        flags.finish(job, STREAM)
        assert torch.equal(out, run(layer, *inputs))


def test_a_stream_waits_until_the_job_has_run(flags, layer, inputs):
    job = flags.new_job(partial(layer.job, *inputs, torch.empty_like(inputs[0])))
    flags.expect([job])
    counters = flags._flags[job]
    counters.count.add_(1)  # announced, but not yet seen: the host is late
    waits = threading.Thread(target=flags.finish, args=(job, STREAM))
    waits.start()
    waits.join(0.2)
    assert waits.is_alive()
    counters.ready.copy_(counters.count)
    waits.join(10)
    assert not waits.is_alive()
    job.wait()


def test_counters_may_pass_their_largest_value(flags):
    from kttrio.device import flags as kernels

    largest = 2**31 - 1
    count, ready = (torch.full((1,), largest, dtype=torch.int32) for _ in range(2))
    kernels.announce(count, ready)
    assert count.item() == ready.item() == -(2**31)
    kernels.wait(count, ready)


def test_every_job_has_flags_of_its_own(flags, layer, inputs):
    made = partial(layer.job, *inputs, torch.empty_like(inputs[0]))
    counters = [flags._flags[flags.new_job(made)] for _ in range(3)]
    places = [c.ready.data_ptr() for c in counters] + [c.done.data_ptr() for c in counters]
    assert len({place // 64 for place in places}) == 6


def test_there_is_an_end_to_jobs_with_flags(flags, layer, inputs, monkeypatch):
    monkeypatch.setattr(handoff, "_MOST_JOBS", 0)
    with pytest.raises(RuntimeError, match="hand over by host functions instead"):
        flags.new_job(partial(layer.job, *inputs, torch.empty_like(inputs[0])))
