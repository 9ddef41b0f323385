"""Random programs: both twins keep every order that the calls ask for, captured or not."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st

from kttrio.device.host import HostDevice
from tests.device.shuffled import ShuffledDevice

NUM_STREAMS = 4  # the main one among them

steps = st.lists(
    st.tuples(
        st.integers(0, NUM_STREAMS - 1),
        st.one_of(st.just("run"), st.just("record"), st.integers(0, 8)),
    ),
    max_size=30,
)
"""Which stream: work, or a new event, or wait for the event of this number (as many as exist)."""


class Done(NamedTuple):
    moments: torch.Tensor  # [works] int64: when each was done
    before: list[set[int]]  # the works that must come before each


def model(program):
    """The works that must come before each work, straight from what the calls promise."""
    behind = [set() for _ in range(NUM_STREAMS)]
    events, before = [], []
    for stream, what in program:
        if what == "run":
            before.append(set(behind[stream]))
            behind[stream].add(len(before) - 1)
        elif what == "record":
            events.append(set(behind[stream]))
        elif what < len(events):
            behind[stream] |= events[what]
    return before


def play(device, program, moments, clock):
    streams = [device.main, *(device.open_stream(str(n)) for n in range(1, NUM_STREAMS))]
    events, number = [], 0
    start = device.main.record()
    for stream in streams[1:]:
        stream.wait(start)
    for index, what in program:
        if what == "run":
            streams[index].run(lambda n=number: moments[n].copy_(clock.add_(1)))
            number += 1
        elif what == "record":
            events.append(streams[index].record())
        elif what < len(events):
            streams[index].wait(events[what])
    for stream in streams[1:]:
        device.main.wait(stream.record())


def check(moments, before):
    assert sorted(moments.tolist()) == list(range(1, len(before) + 1)), "each work once"
    for work, earlier in enumerate(before):
        assert all(moments[other] < moments[work] for other in earlier)


def run_both_ways(device, program):
    before = model(program)
    moments, clock = torch.zeros(len(before), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    play(device, program, moments, clock)
    check(moments, before)
    graph = device.capture(lambda: play(device, program, moments, clock))
    for _ in range(2):
        clock.zero_()
        moments.zero_()
        graph.replay()
        check(moments, before)
    device.synchronize()


@given(steps)
def test_the_host_keeps_every_order(program):
    run_both_ways(HostDevice(), program)


@given(steps, st.integers(0, 1 << 16))
def test_the_shuffled_device_keeps_every_order(program, seed):
    run_both_ways(ShuffledDevice(seed), program)


def orders(make, program, num_works):
    found = Counter()
    for seed in range(200):
        device = make(seed)
        moments, clock = (
            torch.zeros(num_works, dtype=torch.int64),
            torch.zeros((), dtype=torch.int64),
        )
        play(device, program, moments, clock)
        found[tuple(moments.tolist())] += 1
    return found


def test_the_shuffled_device_finds_every_order_and_the_host_one_of_them():
    program = [(1, "run"), (1, "record"), (2, "run"), (2, 0), (2, "run"), (3, "run")]
    shuffled = orders(ShuffledDevice, program, 4)
    host = orders(lambda seed: HostDevice(), program, 4)
    assert len(host) == 1
    assert set(host) < set(shuffled)
    assert len(shuffled) == 8  # of works a, b, c, d with a < c and b < c: 4! / 3
