"""Experts that pass through the ring."""

from __future__ import annotations

import threading

import pytest
import torch

from kttrio.device.host import HostDevice
from kttrio.experts import streamed
from kttrio.experts.feeders import Feeders, _Staging
from kttrio.experts.routing import Routing
from kttrio.experts.streamed import Part
from kttrio.native import NativeError
from tests.device.shuffled import ShuffledDevice
from tests.experts.rings import ALL, HIDDEN, NUM_EXPERTS, TOKENS, TOP_K, AtOnce, machine
from tests.native.expert_reference import (
    KINDS,
    expected,
    random_input,
    random_routing,
    relative_error,
)

EXACT = 2e-6  # sums of float32 beside those of double precision


def right(result):
    out, wanted = result
    return relative_error(out, wanted) < EXACT


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_passes_through_gives_what_the_host_gives(kind):
    with machine(kind) as made:
        assert right(made.stream())


@pytest.mark.parametrize("num_slots", [2, 3, 4, 7, NUM_EXPERTS + 5, 3 * NUM_EXPERTS])
def test_rings_of_every_size(num_slots):
    with machine(num_slots=num_slots) as made:
        assert right(made.stream())
        assert right(made.stream([4, 0, 9], seed=1))
        assert made.ring.num_sent == NUM_EXPERTS + 3


def test_a_ring_needs_two_slots():
    with pytest.raises(ValueError, match="a ring of 1 slots, but it needs 2"), machine(num_slots=1):
        pass


@pytest.mark.parametrize("experts", [[], [12], [3, 1, 2], [0, 12, 5, 7, 9]], ids=str)
def test_only_the_calls_experts_are_sent_and_each_once(experts):
    with machine() as made:
        assert right(made.stream(experts))
        assert made.ring.num_sent == len(experts)
        nbytes = sum(t.nbytes for t in made.experts[0][0].tensors().values() if t is not None)
        assert made.ring.sent_bytes == nbytes * len(experts)


def test_what_is_there_already_is_added_to():
    with machine() as made:
        call = made.begin()
        call.out.fill_(3)
        list(call.steps)
        assert relative_error(call.out - 3, call.wanted) < 10 * EXACT


def test_choices_may_be_summed_apart_though_each_expert_is_sent_once():
    with machine() as made:
        call = made.begin()
        ids, weights = random_routing(TOKENS, TOP_K, NUM_EXPERTS, seed=1)
        outs = torch.zeros(2, TOKENS, HIDDEN)
        first = torch.tensor([True, False, False])
        shares = [ids.where(first, -1), ids.where(~first, -1)]
        parts = [
            Part(Routing(*pair), out)
            for *pair, out in zip(shares, [weights] * 2, outs, strict=True)
        ]
        x = random_input(TOKENS, HIDDEN, seed=0, dtype=torch.float32)
        list(made.ring.stream(made.layers[0], ALL, x=x, parts=parts))
        assert right((outs.sum(0), call.wanted))
        assert right((outs[0], expected(made.experts[0], x, shares[0], weights)))
        assert made.ring.num_sent == NUM_EXPERTS


def test_other_work_may_run_between_groups():
    with machine() as made:
        call = made.begin()
        others = 0
        for _ in call.steps:
            x = torch.ones(1, 64)
            ids, weights = torch.tensor([[2]], dtype=torch.int32), torch.ones(1, 1)
            made.layers[0].forward(x, ids, weights, torch.empty_like(x))
            others += 1
        assert right((call.out, call.wanted))
        assert others == 1 + 5, "13 experts, 3 slots in each half"


def late(seed):
    """As on a GPU the main stream, too, does its work when it likes."""
    device = ShuffledDevice(seed)
    device.main._is_main = False
    return device


def several(made, seed):
    yield made.stream(seed=seed)
    made.ring.prefetch(made.layers[1], ALL[::2])
    yield made.stream(layer=1)
    yield made.stream([7, 1, 5])
    yield made.stream(layer=1)


@pytest.mark.parametrize("num_slots", [2, 5, 26])
@pytest.mark.parametrize("seed", range(20))
def test_no_slot_is_used_or_overwritten_too_early(seed, num_slots):
    """Whatever order the events leave open."""
    with machine(device=late(seed), num_slots=num_slots, num_layers=2, threads=AtOnce()) as made:
        assert all(right(result) for result in several(made, seed))


@pytest.mark.parametrize("seed", range(20))
def test_copies_may_come_between_any_two_operations(seed):
    with machine(device=ShuffledDevice(seed), num_layers=2, threads=AtOnce()) as made:
        with made.device.stirred():
            results = list(several(made, seed))
        assert all(right(result) for result in results)


def no_wait_for_the_last_use(patch):
    feed = Feeders.feed
    patch.setattr(Feeders, "feed", lambda self, load: feed(self, load._replace(free=None)))


def no_wait_for_the_copy(patch):
    patch.setattr(streamed._Group, "wait", lambda group, _: (dict(zip_slots(group)), []))


def no_wait_for_the_staging(patch):
    patch.setattr(_Staging, "wait", lambda _: None)


def zip_slots(group):
    return [pair for load in group.loads for pair in load.slots.items()]


@pytest.mark.parametrize(
    "forget", [no_wait_for_the_last_use, no_wait_for_the_copy, no_wait_for_the_staging]
)
def test_each_wait_is_needed(forget, monkeypatch):
    """That the tests above can fail."""
    forget(monkeypatch)
    wrong = 0
    for seed in range(20):
        for num_slots in (2, 26):
            with machine(device=late(seed), num_slots=num_slots, threads=AtOnce()) as made:
                wrong += not right(made.stream(seed=seed))
    assert wrong


def test_feeders_race_with_nobody():
    """Threads as they come, and calls that follow each other closely."""
    with machine(num_layers=2, num_slots=4) as made:
        for seed in range(60):
            assert right(made.stream(layer=seed % 2, seed=seed))
            made.ring.prefetch(made.layers[1 - seed % 2 * (seed % 3 > 0)], ALL)


def test_what_was_prefetched_is_not_sent_again():
    with machine(num_layers=2) as made:
        made.ring.prefetch(made.layers[1], ALL)
        assert right(made.stream(layer=1))
        assert made.ring.num_sent == NUM_EXPERTS
        assert made.ring.num_wasted == 0


def test_past_calls_say_what_is_prefetched():
    with machine() as made:
        for experts in ([1, 8, 12], [12, 8, 3], [8, 12, 1, 4, 3, 5], [12]):
            made.stream(experts)
        made.ring.prefetch(made.layers[0], ALL)
        before = made.ring.num_sent
        assert right(made.stream([12, 8, 1, 3, 4, 5]))
        assert made.ring.num_sent <= before + 6
        assert made.ring.num_wasted == 0


def test_what_is_prefetched_for_nothing_is_counted():
    with machine(num_layers=2, threads=AtOnce()) as made:
        made.ring.prefetch(made.layers[0], [0, 1, 2, 3])
        assert right(made.stream([1, 5]))
        assert (made.ring.num_wasted, made.ring.num_sent) == (3, 5)
        made.ring.prefetch(made.layers[0], [0, 1])
        assert right(made.stream([1, 5], layer=1))
        assert (made.ring.num_wasted, made.ring.num_sent) == (5, 9)


def test_what_could_not_be_prefetched_comes_once_more_if_it_is_needed():
    with machine() as made:
        made.layers[0].clear_expert(2)
        made.ring.prefetch(made.layers[0], ALL)
        assert right(made.stream([e for e in ALL if e != 2]))
        made.ring.prefetch(made.layers[0], [2])
        with pytest.raises(NativeError, match="expert 2 has no weights here"):
            made.stream([1, 2])


def test_an_expert_that_is_not_there_fails_its_call_only():
    with machine(num_layers=2) as made:
        made.layers[0].clear_expert(6)
        with pytest.raises(NativeError, match="expert 6 has no weights here"):
            made.stream()
        assert not made.ring.is_busy
        assert right(made.stream(layer=1))
        assert right(made.stream([e for e in ALL if e != 6]))


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_copy_that_fails_fails_its_call_only(at, monkeypatch):
    with machine() as made:
        stream = made.ring._feeders._copies
        left = iter(range(at - 1))

        def run(work, real=stream.run):
            if next(left, None) is None and stream.run is run:
                monkeypatch.undo()
                raise ArithmeticError("of the copy")
            real(work)

        monkeypatch.setattr(stream, "run", run)
        with pytest.raises(ArithmeticError, match="of the copy"):
            made.stream()
        assert right(made.stream())


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_launch_that_fails_fails_its_call_only(at, monkeypatch):
    with machine() as made:
        left = iter(range(at - 1))

        def multiply(*args, real=streamed.grouped_mlp, **named):
            if next(left, None) is None:
                raise ArithmeticError("of the launch")
            real(*args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(streamed, "grouped_mlp", multiply)
            with pytest.raises(ArithmeticError, match="of the launch"):
                made.stream()
        assert right(made.stream())


@pytest.mark.parametrize("groups", range(5))
def test_a_call_that_is_given_up_leaves_the_ring_ready(groups):
    with machine(num_layers=2) as made:
        call = made.begin()
        for _ in range(groups + 1):
            next(call.steps)
        call.steps.close()
        assert not made.ring.is_busy
        assert right(made.stream(layer=1))


def test_one_call_at_a_time():
    with machine() as made:
        call = made.begin()
        next(call.steps)
        assert made.ring.is_busy
        with pytest.raises(RuntimeError, match="in use"):
            made.stream(seed=1)
        list(call.steps)
        assert right((call.out, call.wanted))
        assert right(made.stream(seed=1))


def feeders():
    return [thread for thread in threading.enumerate() if thread.name.startswith("feeder")]


def test_no_thread_outlives_the_ring():
    with machine() as made:
        made.ring.prefetch(made.layers[0], ALL)
        assert feeders()
        made.ring.close()
        assert not feeders()
        made.ring.close()
        with pytest.raises(RuntimeError):
            made.stream()


def test_slots_made_in_inference_mode_are_filled():
    with torch.inference_mode(), machine(device=HostDevice()) as made:
        assert right(made.stream())
