"""The CUDA device: on a GPU where there is one, else its calls, heard by a torch.cuda that is none.

Not all of CUDA's rules are known to the fake; what it shows is the order of calls.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from kttrio.device import cuda
from kttrio.device.cuda import CudaDevice
from kttrio.native import NativeError
from tests.native.expert_reference import run

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class FakeStream:
    def __init__(self, fake, name):
        self._fake, self.name, self.cuda_stream = fake, name, hash(name)

    def wait_event(self, event):
        self._fake.calls.append(f"{self.name} waits for {event.name}")

    def wait_stream(self, other):
        self._fake.calls.append(f"{self.name} waits for {other.name}")


class FakeEvent:
    def __init__(self, fake):
        self._fake = fake

    def record(self, stream):
        self.name = f"event of {stream.name}"
        self._fake.calls.append(f"{stream.name} records")

    def query(self):
        return True

    def synchronize(self):
        self._fake.calls.append(f"host waits for {self.name}")


class FakeCuda:
    """What `CudaDevice` uses of torch.cuda."""

    def __init__(self):
        self.calls = []
        self._names = iter(["aside", "side", "other"])
        self._current = [FakeStream(self, "default")]
        self.set_device = self.calls.append
        self.graph_pool_handle = lambda: "pool"
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: self.calls.append("replay"))

    def Stream(self, where):
        return FakeStream(self, next(self._names))

    def Event(self, *, blocking):
        assert blocking  # one that spins takes a core from the experts
        return FakeEvent(self)

    def current_stream(self, where):
        return self._current[-1]

    @contextmanager
    def stream(self, stream):
        self._current.append(stream or self._current[-1])
        yield
        self._current.pop()

    @contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        self.calls.append(f"begin {pool} {capture_error_mode}")
        with self.stream(stream):
            yield
        self.calls.append("end")

    def synchronize(self, where):
        self.calls.append("host waits for all")


class HeardMessenger:
    """Does jobs at once and tells; what is captured is not done."""

    def __init__(self, calls):
        self._calls = calls

    def new_job(self, make):
        return make()

    def start(self, job, stream, *, captured):
        self._calls.append(f"start on {stream}{' captured' * captured}")
        if not captured:
            job.submit()

    def finish(self, job, stream):
        self._calls.append(f"finish on {stream}")
        job.join()

    def expect(self, jobs):
        self._calls.append(f"expect {len(jobs)}")


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(cuda, "torch", SimpleNamespace(cuda=fake, inference_mode=torch.no_grad))
    messenger = HeardMessenger(fake.calls)
    monkeypatch.setattr(cuda, "_messenger", lambda where, handoff: messenger)
    return fake


@pytest.fixture
def device(fake):
    made = CudaDevice("cuda:0")
    fake.calls.clear()
    return made


def test_streams_and_events_are_torchs(fake, device):
    side = device.open_stream("experts")
    side.wait(device.main.record())
    side.run(lambda: fake.calls.append(f"work on {fake.current_stream(0).name}"))
    device.main.run(lambda: fake.calls.append(f"work on {fake.current_stream(0).name}"))
    event = side.record()
    device.main.wait(event)
    assert event.is_done
    event.synchronize()
    assert fake.calls == [
        "default records",
        "side waits for event of default",
        "work on side",
        "work on default",
        "side records",
        "default waits for event of side",
        "host waits for event of side",
    ]


def test_jobs_are_handed_over_on_their_stream(fake, device, layer, inputs):
    side = device.open_stream("experts")
    job = device.new_job(partial(layer.job, *inputs, torch.empty_like(inputs[0])))
    side.start(job)
    side.finish(job)
    device.main.start(job)
    assert fake.calls == [
        f"start on {hash('side')}",
        f"finish on {hash('side')}",
        f"start on {hash('default')}",
    ]
    device.synchronize()


def hybrid(device, side, job):
    side.wait(device.main.record())
    side.start(job)
    side.finish(job)
    device.main.wait(side.record())


def test_a_step_is_warmed_up_aside_and_then_captured(fake, device, layer, inputs):
    side = device.open_stream("experts")
    job = device.new_job(partial(layer.job, *inputs, torch.empty_like(inputs[0])))
    graph = device.capture(lambda: hybrid(device, side, job))
    on = hash("side")
    assert fake.calls == [
        "aside waits for default",
        *("aside records", "side waits for event of aside"),
        *(f"start on {on}", f"finish on {on}"),
        *("side records", "aside waits for event of side"),
        *("default waits for aside", "host waits for all"),
        "begin pool thread_local",
        *("aside records", "side waits for event of aside"),
        *(f"start on {on} captured", f"finish on {on}"),
        *("side records", "aside waits for event of side"),
        "end",
    ]
    fake.calls.clear()
    graph.replay()
    assert fake.calls == ["expect 1", "replay"]


def test_all_captures_share_a_stream(fake, device):
    streams = []
    for _ in range(20):
        device.capture(lambda: streams.append(fake.current_stream(0)))
    assert {stream.name for stream in streams} == {"aside"}


def test_what_goes_wrong_in_a_replayed_job_is_told(fake, device, layer, inputs):
    job = device.new_job(partial(layer.job, *inputs, torch.empty_like(inputs[0])))
    graph = device.capture(lambda: device.main.start(job))
    layer.clear_expert(1)
    device.check_jobs()
    job.submit()  # as the replay of a real graph does
    graph.replay()
    with pytest.raises(NativeError, match="that expert has no weights"):
        device.check_jobs()
    device.check_jobs()


def test_a_graph_whose_jobs_are_closed_is_not_replayed(device, layer, inputs):
    job = device.new_job(partial(layer.job, *inputs, torch.empty_like(inputs[0])))
    graph = device.capture(lambda: device.main.start(job))
    layer.close()
    with pytest.raises(RuntimeError, match="a job of this captured step is closed"):
        graph.replay()


def test_a_captured_step_starts_a_job_once(device, layer, inputs):
    job = device.new_job(partial(layer.job, *inputs, torch.empty_like(inputs[0])))

    def twice():
        for _ in range(2):
            device.main.start(job)
            device.main.finish(job)

    with pytest.raises(RuntimeError, match="can start a job once"):
        device.capture(twice)
    assert not device.is_capturing


@pytest.mark.parametrize("forbidden", ["synchronize", "capture"])
def test_a_captured_step_may_not_wait(device, forbidden):
    def step():
        if device.is_capturing:
            device.synchronize() if forbidden == "synchronize" else device.capture(lambda: None)

    with pytest.raises(RuntimeError, match="a captured step may not"):
        device.capture(step)


# On a GPU.


@pytest.fixture(params=["host-function", "flags"])
def real(request):
    return CudaDevice(torch.device("cuda", 0), handoff=request.param)


class Hybrid:
    """One layer's hand-over, as the hybrid experts do it, and something beside it."""

    def __init__(self, device, layer, inputs):
        self.device, self.side = device, device.open_stream("experts")
        self.x, self.ids, self.weights = (tensor.to(device.where) for tensor in inputs)
        self.pinned = [device.pinned(*t.shape, dtype=t.dtype) for t in (*inputs, inputs[0])]
        self.job = device.new_job(partial(layer.job, *self.pinned))
        self.back, self.total = torch.empty_like(self.x), torch.empty_like(self.x)

    def __call__(self):
        scaled = self.x * 3
        self.side.wait(self.device.main.record())
        self.side.run(lambda: self._send(scaled))
        self.side.start(self.job)
        self.side.finish(self.job)
        self.side.run(lambda: self.back.copy_(self.pinned[3], non_blocking=True))
        beside = scaled.sum(1, keepdim=True)
        self.device.main.wait(self.side.record())
        self.total.copy_(self.back + beside)

    def _send(self, scaled):
        for pinned, tensor in zip(self.pinned, (scaled, self.ids, self.weights), strict=False):
            pinned.copy_(tensor, non_blocking=True)


def expected(layer, inputs, turn):
    scaled = inputs[0] * turn * 3
    return run(layer, scaled, *inputs[1:]) + scaled.sum(1, keepdim=True)


@pytest.mark.parametrize("is_captured", [pytest.param(b, marks=gpu) for b in (False, True)])
def test_gpu_and_host_work_together(real, layer, inputs, is_captured):
    step = Hybrid(real, layer, inputs)
    again = real.capture(step).replay if is_captured else step
    for turn in range(1, 50):
        step.x.copy_(inputs[0] * turn)
        again()
        torch.testing.assert_close(step.total.cpu(), expected(layer, inputs, turn))
    real.synchronize()


@pytest.mark.parametrize("is_captured", [pytest.param(b, marks=gpu) for b in (False, True)])
def test_on_a_gpu_a_failing_job_is_told_and_the_next_one_runs(real, layer, inputs, is_captured):
    step = Hybrid(real, layer, inputs)
    again = real.capture(step).replay if is_captured else step
    step.ids.fill_(layer.num_experts)  # there is no such expert
    again()
    with pytest.raises(NativeError, match="expert"):
        real.synchronize()
    step.ids.copy_(inputs[1])
    again()
    torch.testing.assert_close(step.total.cpu(), expected(layer, inputs, 1))
    real.synchronize()


@pytest.mark.parametrize("handoff", [pytest.param("host-function", marks=gpu)])
def test_a_gpu_refuses_to_capture_what_waits(handoff):
    device = CudaDevice(torch.device("cuda", 0), handoff=handoff)
    x = torch.zeros(1, device=device.where)
    with pytest.raises(RuntimeError):
        device.capture(lambda: x.item())
    assert not device.is_capturing


@pytest.mark.parametrize("handoff", [pytest.param("host-function", marks=gpu)])
def test_a_gpu_copies_from_pinned_memory_without_waiting(handoff):
    device = CudaDevice(torch.device("cuda", 0), handoff=handoff)
    pinned = device.pinned(1 << 20, dtype=torch.float32)
    assert pinned.is_pinned()
    side, back = device.open_stream("copies"), torch.zeros(1 << 20, device=device.where)
    side.wait(device.main.record())
    side.run(lambda: back.copy_(pinned.fill_(2), non_blocking=True))
    event = side.record()
    event.synchronize()
    assert event.is_done
    assert bool((back == 2).all())
