"""Forwards without their caller."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import pytest
import torch

from kttrio.native import ExpertLayer, NativeError, Pool, host_functions
from tests.native.expert_reference import (
    BF16,
    make_layer,
    random_experts,
    random_input,
    random_routing,
    run,
)

TOKENS, HIDDEN = 12, 64


@pytest.fixture
def layer() -> Iterator[ExpertLayer]:
    experts = random_experts(3, HIDDEN, 96, kind=BF16, seed=1)
    with Pool(threads=2) as pool, make_layer(pool, experts, activation="float32") as made:
        yield made


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, weights = random_routing(TOKENS, 2, 3, seed=2)
    return random_input(TOKENS, HIDDEN, seed=3, dtype=torch.float32), ids, weights


def counter() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32)


BOTH_KINDS = pytest.mark.parametrize("by_waiter", [False, True])


@BOTH_KINDS
def test_a_job_does_what_a_forward_does(layer, inputs, by_waiter) -> None:
    out = torch.empty(TOKENS, HIDDEN)
    with layer.job(*inputs, out, by_waiter=by_waiter) as job:
        for seed in range(3):
            inputs[0].copy_(random_input(TOKENS, HIDDEN, seed=seed, dtype=torch.float32))
            job.submit()
            job.wait()
            assert torch.equal(out, run(layer, *inputs))
        job.wait()  # nothing is pending


@BOTH_KINDS
def test_the_number_of_tokens_is_read_when_it_runs(layer, inputs, by_waiter) -> None:
    out, num_tokens = torch.full((TOKENS, HIDDEN), 7.0), counter()
    with layer.job(*inputs, out, num_tokens=num_tokens, by_waiter=by_waiter) as job:
        num_tokens[0] = 5
        job.submit()
        job.wait()
        assert torch.equal(out[:5], run(layer, *inputs)[:5])
        assert (out[5:] == 7.0).all()
        num_tokens[0] = TOKENS + 1
        job.submit()
        with pytest.raises(NativeError, match="num_tokens"):
            job.wait()


def test_a_waiters_job_runs_when_it_is_waited_for(layer, inputs) -> None:
    out = torch.full((TOKENS, HIDDEN), 7.0)
    with layer.job(*inputs, out, by_waiter=True) as job:
        job.submit()
        assert (out == 7.0).all()
        with pytest.raises(NativeError, match="still pending; wait for it"):
            job.submit()
        job.join()
        assert torch.equal(out, run(layer, *inputs))
        job.submit()
    with pytest.raises(NativeError, match="no use for ready and done"):
        layer.job(*inputs, out, by_waiter=True, ready=counter())


def test_a_job_waits_until_its_input_is_ready(layer, inputs) -> None:
    out, ready, done = torch.zeros(TOKENS, HIDDEN), counter(), counter()
    with layer.job(*inputs, out, ready=ready, done=done) as job:
        for turn in (1, 2):
            job.submit()
            assert done.item() == turn - 1
            inputs[0].mul_(0.5)
            ready[0] = turn
            job.wait()
            assert done.item() == turn
            assert torch.equal(out, run(layer, *inputs))


def test_a_pending_job_is_not_submitted_again(layer, inputs) -> None:
    out, ready = torch.zeros(TOKENS, HIDDEN), counter()
    with layer.job(*inputs, out, ready=ready) as job:
        job.submit()
        with pytest.raises(NativeError, match="pending"):
            job.submit()
        ready[0] = 1
        job.wait()


def test_jobs_run_in_the_order_of_submission(layer, inputs) -> None:
    out = torch.zeros(TOKENS, HIDDEN)
    with (
        layer.job(*inputs, out) as first,
        layer.job(*inputs, out, accumulate=True) as second,
    ):
        for job in (first, second):
            job.submit()
        second.wait()
        first.wait()
    once = run(layer, *inputs)
    assert torch.equal(out, once + once)


@BOTH_KINDS
def test_what_goes_wrong_is_told_by_the_wait(layer, inputs, by_waiter) -> None:
    with layer.job(*inputs, torch.empty(TOKENS, HIDDEN), by_waiter=by_waiter) as job:
        layer.clear_expert(1)
        job.submit()
        job.join()
        with pytest.raises(NativeError, match="= 1, but that expert has no weights"):
            job.wait()
        job.wait()


def test_host_functions_take_the_handle(layer, inputs) -> None:
    """As a CUDA stream calls them, from a thread of its own."""
    out = torch.empty(TOKENS, HIDDEN)
    signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    submit, wait = (signature(address) for address in host_functions())
    with layer.job(*inputs, out) as job:

        def stream() -> None:
            submit(job.handle)
            wait(job.handle)

        thread = threading.Thread(target=stream)
        thread.start()
        thread.join()
        job.wait()
    assert torch.equal(out, run(layer, *inputs))


@pytest.mark.parametrize("flags", [{"ready": counter()}, {"by_waiter": True}], ids=str)
def test_a_layer_closes_its_jobs(layer, inputs, flags) -> None:
    job = layer.job(*inputs, torch.empty(TOKENS, HIDDEN), **flags)
    job.submit()  # and never ready, or waited for
    layer.close()
    with pytest.raises(NativeError, match="the job is closed"):
        job.submit()
    job.close()


def test_wrong_flags_and_sizes_are_named(layer, inputs) -> None:
    out = torch.empty(TOKENS, HIDDEN)
    with pytest.raises(NativeError, match="done is float32, but must be int32"):
        layer.job(*inputs, out, done=torch.zeros(1))
    with pytest.raises(NativeError, match=r"ready has shape \(2,\)"):
        layer.job(*inputs, out, ready=torch.zeros(2, dtype=torch.int32))
    many = [tensor.repeat(10, 1) for tensor in (*inputs, out)]
    with pytest.raises(NativeError, match="num_tokens is 120, but must be from 0 to 70"):
        layer.job(*many)
