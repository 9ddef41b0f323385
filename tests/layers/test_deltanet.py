from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kttrio.layers import deltanet
from kttrio.layers import runs as runs_module
from kttrio.layers.cache import RecurrentCache
from kttrio.layers.deltanet import GatedDeltaNet
from kttrio.layers.step import Step
from tests.batches import Run, make_batch

KEY, VALUE = 16, 24  # unequal on purpose: a transposed state must show


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = GatedDeltaNet(
        32,
        key_heads=2,
        value_heads=4,
        key_dim=KEY,
        value_dim=VALUE,
        kernel=4,
        eps=1e-6,
        dtype=torch.float32,
    )
    for parameter in layer.parameters():
        parameter.normal_(std=0.3)
    return layer


def new_cache(layer, slots):
    return RecurrentCache(
        conv=torch.full((slots, 3, layer.channels), torch.nan),
        state=torch.full((slots, 4, KEY, VALUE), torch.nan),
    )


def batch_of(*runs):
    """(slot, start, length) of each sequence."""
    return make_batch([Run(slot, start, (0,) * n, tuple(range(9))) for slot, start, n in runs], 64)


def advance(layer, cache, hidden, *runs):
    return layer(hidden, Step(batch_of(*runs)), cache)


def test_lanes_of_one_batch_never_meet(layer):
    """Two decodes and four runs of one, two and three chunks, against each sequence alone."""
    runs = [(3, 0, 1), (0, 5, 1), (5, 0, 70), (1, 7, 3), (4, 0, 64), (2, 5, 130)]
    cache = new_cache(layer, 6)
    for slot, start, _ in runs:
        if start:
            advance(layer, cache, torch.randn(start, 32), (slot, 0, start))
    alone = RecurrentCache(cache.conv.clone(), cache.state.clone())
    hidden = torch.randn(sum(length for *_, length in runs), 32)
    together = advance(layer, cache, hidden, *runs)
    parts = hidden.split([length for *_, length in runs])
    single = [advance(layer, alone, part, run) for part, run in zip(parts, runs, strict=True)]
    torch.testing.assert_close(together, torch.cat(single), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.state, alone.state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.conv, alone.conv)


@pytest.mark.parametrize("most", [64, 128, 192])
def test_parts_of_a_run_give_what_the_whole_does(layer, monkeypatch, most):
    """Lanes apart, and the tokens of long ones, whatever is taken at a time."""
    runs = [(0, 5, 1), (1, 0, 150), (2, 7, 190), (3, 0, 20), (4, 0, 30), (5, 0, 64)]
    whole = new_cache(layer, 6)
    for slot, start, _ in runs:
        if start:
            advance(layer, whole, torch.randn(start, 32), (slot, 0, start))
    parted = RecurrentCache(whole.conv.clone(), whole.state.clone())
    hidden = torch.randn(sum(length for *_, length in runs), 32)
    expected = advance(layer, whole, hidden, *runs)
    for module in (deltanet, runs_module):
        monkeypatch.setattr(module, "MAX_TOGETHER", most)
    found = advance(layer, parted, hidden, *runs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parted.state, whole.state, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parted.conv, whole.conv)


def test_nan_in_one_lane_spoils_no_other(layer):
    runs = [(0, 5, 1), (1, 5, 1), (2, 0, 70), (3, 0, 90)]
    cache = new_cache(layer, 4)
    for slot in (0, 1):
        advance(layer, cache, torch.randn(5, 32), (slot, 0, 5))
    alone = RecurrentCache(cache.conv.clone(), cache.state.clone())
    parts = [torch.randn(length, 32) for *_, length in runs]
    parts[1][0], parts[3][10] = torch.nan, torch.nan
    outs = advance(layer, cache, torch.cat(parts), *runs).split([len(part) for part in parts])
    for i in (0, 2):
        torch.testing.assert_close(
            outs[i], advance(layer, alone, parts[i], runs[i]), rtol=1e-4, atol=1e-5
        )
    assert outs[1].isnan().all()
    assert outs[3][-1].isnan().all()


@pytest.mark.parametrize("chunks", [(66,), (1, 1, 1, 63), (2, 64), (65, 1)])
def test_the_convolution_remembers_over_any_border(layer, chunks):
    hidden = torch.randn(66, 32)
    expected = advance(layer, new_cache(layer, 1), hidden, (0, 0, 66))
    cache, start, outs = new_cache(layer, 1), 0, []
    for chunk in chunks:
        part = hidden[start : start + chunk]
        outs.append(advance(layer, cache, part, (0, start, chunk)))
        start += chunk
    torch.testing.assert_close(torch.cat(outs), expected, rtol=1e-4, atol=1e-5)


def test_the_newest_input_meets_the_last_weight(layer):
    """The convolution's cache ends with the newest pre-activation column."""
    cache, hidden = new_cache(layer, 1), torch.randn(5, 32)
    advance(layer, cache, hidden, (0, 0, 5))
    columns = layer.in_proj(hidden)[:, : layer.channels]
    torch.testing.assert_close(cache.conv[0], columns[-3:])


def test_other_slots_are_not_written(layer):
    cache = new_cache(layer, 4)
    advance(layer, cache, torch.randn(6, 32), (2, 0, 1), (1, 0, 5))
    for tensor in (cache.conv, cache.state):
        finite = tensor.flatten(1).isfinite().all(1)
        assert finite.tolist() == [False, True, True, False]


class TestDrafts:
    """What of them is refused must leave no trace, whatever stood beside it in the step."""

    runs = ((3, 0, 1), (0, 6, 5), (1, 0, 4), (2, 7, 3))  # those in slots 0 and 2 end with drafts
    drafts = (0, 4, 0, 2)

    def advanced(self, layer):
        cache = new_cache(layer, 4)
        for slot, start in ((0, 6), (2, 7)):
            advance(layer, cache, torch.randn(start, 32), (slot, 0, start))
        return cache

    def verify(self, layer, cache, hidden):
        batch = replace(batch_of(*self.runs), num_drafts=self.drafts)
        return layer(hidden, Step(batch), cache)

    @pytest.mark.parametrize("lengths", [(1, 1), (5, 3), (1, 3), (3, 2)])
    def test_only_what_is_accepted_is_remembered(self, layer, lengths):
        cache = self.advanced(layer)
        plain = RecurrentCache(cache.conv.clone(), cache.state.clone())
        hidden = torch.randn(13, 32)
        out = self.verify(layer, cache, hidden)
        layer.settle(torch.tensor(lengths), cache)
        parts = hidden.split([1, 5, 4, 3])
        kept = (1, lengths[0], 4, lengths[1])
        for part, (slot, start, _), n, own in zip(
            parts, self.runs, kept, out.split([1, 5, 4, 3]), strict=True
        ):
            expected = advance(layer, plain, part[:n], (slot, start, n))
            torch.testing.assert_close(own[:n], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache.state, plain.state, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cache.conv, plain.conv)
        assert cache.trail is None

    def test_before_that_only_the_first_token_is(self, layer):
        cache = self.advanced(layer)
        plain = RecurrentCache(cache.conv.clone(), cache.state.clone())
        hidden = torch.randn(13, 32)
        self.verify(layer, cache, hidden)
        for first, slot, start in ((1, 0, 6), (10, 2, 7)):
            advance(layer, plain, hidden[first : first + 1], (slot, start, 1))
            torch.testing.assert_close(cache.state[slot], plain.state[slot])
            torch.testing.assert_close(cache.conv[slot], plain.conv[slot])

    def test_a_trail_is_followed_once(self, layer):
        with pytest.raises(ValueError, match="no drafts"):
            layer.settle(torch.tensor([1]), new_cache(layer, 1))
