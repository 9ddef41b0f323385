"""A ring that lives through anything: calls, guesses, calls given up, experts that come and go."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from kttrio.native import NativeError
from tests.device.shuffled import ShuffledDevice
from tests.experts.rings import ALL, AtOnce, machine
from tests.native.expert_reference import relative_error, set_expert

EXACT = 2e-6

layers = st.integers(0, 1)
experts = st.lists(st.sampled_from(ALL), unique=True)
deeds = st.one_of(
    st.tuples(st.just("stream"), layers, experts),
    st.tuples(st.just("prefetch"), layers, experts),
    st.tuples(st.just("give up"), layers, experts, st.integers(0, 3)),
    st.tuples(st.just("lose"), layers, st.sampled_from(ALL)),
    st.tuples(st.just("find"), layers, st.sampled_from(ALL)),
)


class Life:
    def __init__(self, made):
        self.made = made
        self.lost = {(layer, expert): False for layer in range(2) for expert in ALL}

    def live(self, deed, layer, *rest):
        getattr(self, deed.replace(" ", "_"))(layer, *rest)

    def stream(self, layer, experts):
        lacks = {expert for expert in experts if self.lost[layer, expert]}
        failure = ""
        try:
            out, wanted = self.made.stream(experts, layer=layer)
        except NativeError as error:
            failure = str(error)
        assert not self.made.ring.is_busy
        if failure:
            assert any(f"expert {expert} has no weights here" in failure for expert in lacks)
        else:  # what is lost may have been prefetched before
            assert relative_error(out, wanted) < EXACT

    def give_up(self, layer, experts, groups):
        call = self.made.begin(experts, layer=layer)
        with suppress(NativeError):
            for _ in range(groups):
                next(call.steps, None)
        call.steps.close()
        assert not self.made.ring.is_busy

    def prefetch(self, layer, experts):
        self.made.ring.prefetch(self.made.layers[layer], experts)

    def lose(self, layer, expert):
        self.made.layers[layer].clear_expert(expert)
        self.lost[layer, expert] = True

    def find(self, layer, expert):
        set_expert(self.made.layers[layer], expert, self.made.experts[layer][expert])
        self.lost[layer, expert] = False


@settings(max_examples=60, deadline=None)
@given(st.lists(deeds, max_size=12), st.integers(2, 9), st.integers(0, 999), st.booleans())
def test_every_call_is_right_or_says_what_is_missing(given, num_slots, seed, has_threads):
    device = None if has_threads else ShuffledDevice(seed)
    threads = None if has_threads else AtOnce()
    with machine(device=device, num_slots=num_slots, num_layers=2, threads=threads) as made:
        life = Life(made)
        for deed in given:
            life.live(*deed)
        for layer, expert in life.lost:
            life.find(layer, expert)
        for layer in range(2):
            life.stream(layer, ALL)
        assert made.ring.num_wasted <= made.ring.num_sent
