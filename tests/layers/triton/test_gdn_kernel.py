from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="kernels need Triton: pip install triton")

from kttrio.layers.cache import RecurrentCache
from kttrio.layers.delta_rule import Heads, delta_tokens
from kttrio.layers.deltanet import GatedDeltaNet
from kttrio.layers.runs import Lanes
from kttrio.layers.step import Step
from kttrio.layers.triton import gdn
from tests.batches import Run, make_batch
from tests.layers.triton.where import DEVICE, needs_gpu


def inputs(lanes, length, sizes, *, strongest_decay=2.0):
    """`sizes`: heads, key size, value size. A state for each lane."""
    heads, keys, values = sizes
    torch.manual_seed(length)
    query, key = (F.normalize(torch.randn(lanes, length, heads, keys), dim=-1) for _ in "qk")
    value = torch.randn(lanes, length, heads, values)
    decay = -torch.rand(lanes, length, heads) * strongest_decay
    beta = torch.rand(lanes, length, heads)
    return Heads(query, key, value, decay, beta), torch.randn(lanes, heads, keys, values)


def expected(heads, state):
    """Outputs and states, token by token."""
    outs = torch.stack(list(delta_tokens(*heads, state)), dim=1)
    return outs, state


def on_device(heads):
    return Heads(*(x.to(DEVICE) for x in heads))


class TestDecode:
    def check(self, length, sizes, fresh):
        heads, begun = inputs(3, length, sizes)
        states = torch.full((5, *begun.shape[1:]), torch.nan)
        slots = torch.tensor([4, 0, 2])
        states[slots] = begun
        if fresh is not None:
            states[slots[fresh]] = torch.nan
            begun[fresh] = 0
        moved, given = states.to(DEVICE), None if fresh is None else fresh.to(DEVICE)
        out = gdn.decode(on_device(heads), moved, Lanes(slots.to(DEVICE), given))
        first = Heads(*(x[:, :1] for x in heads))
        _, remembered = expected(first, begun.clone())
        outs, _ = expected(heads, begun)
        torch.testing.assert_close(out.cpu(), outs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moved.cpu()[slots], remembered, rtol=1e-4, atol=1e-5)
        assert moved[[1, 3]].isnan().all()

    @pytest.mark.parametrize("fresh", [None, torch.tensor([False, True, False])])
    @pytest.mark.parametrize("length", [1, 3])
    def test_drafts_are_not_remembered(self, length, fresh):
        self.check(length, (3, 24, 40), fresh)

    @pytest.mark.parametrize(
        "sizes", [pytest.param((32, 128, 128), marks=needs_gpu, id="published")]
    )
    def test_published_sizes(self, sizes):
        self.check(2, sizes, torch.tensor([False, True, False]))


class TestChunks:
    def check(self, lanes, length, sizes, *, strongest_decay=2.0, tolerance=1e-4):
        heads, state = inputs(lanes, length, sizes, strongest_decay=strongest_decay)
        outs, after = expected(heads, state.clone())
        out, new_state = gdn.chunks(on_device(heads), state.to(DEVICE))
        torch.testing.assert_close(out.cpu(), outs, rtol=tolerance, atol=tolerance / 10)
        torch.testing.assert_close(new_state.cpu(), after, rtol=tolerance, atol=tolerance / 10)

    @pytest.mark.parametrize("length", [1, 37, 64, 130])
    def test_they_are_the_recurrence(self, length):
        self.check(2, length, (2, 24, 40))

    def test_fast_decay_does_not_overflow(self):
        self.check(1, 64, (1, 16, 16), strongest_decay=200.0, tolerance=1e-3)

    def test_segments_carry_the_state(self, monkeypatch):
        monkeypatch.setattr(gdn, "_SEGMENT", 1)
        self.check(1, 150, (2, 16, 16))

    def test_equal_keys_stay_exact(self):
        """A text that repeats itself: powers of the mixing matrix would grow beyond all bounds."""
        heads, state = inputs(1, 64, (1, 16, 16), strongest_decay=0.0)
        heads.key[:] = heads.key[:, :1]
        heads.beta[:] = 1
        outs, _ = expected(heads, state.clone())
        out, _ = gdn.chunks(on_device(heads), state.to(DEVICE))
        torch.testing.assert_close(out.cpu(), outs, rtol=1e-4, atol=1e-5)

    def test_padding_leaves_the_state_alone(self):
        heads, state = inputs(2, 64, (2, 16, 16))
        heads.key[:, 40:], heads.decay[:, 40:] = 0, 0
        short = Heads(*(x[:, :40] for x in heads))
        outs, after = expected(short, state.clone())
        out, new_state = gdn.chunks(on_device(heads), state.to(DEVICE))
        torch.testing.assert_close(out.cpu()[:, :40], outs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new_state.cpu(), after, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("length", [pytest.param(n, marks=needs_gpu) for n in (64, 1000, 2500)])
    def test_published_sizes(self, length):
        self.check(2, length, (32, 128, 128), tolerance=1e-2)


class TestLayer:
    """Kernels in their place: a step of decodes, drafts and runs, some of them new."""

    runs = (Run(3, 6, (0,), (0,)), Run(0, 6, (0,) * 3, (1,)), Run(1, 0, (0,) * 70, (2, 3)))

    @pytest.fixture
    def layer(self):
        torch.manual_seed(0)
        shape = {"key_heads": 1, "value_heads": 2, "key_dim": 16, "value_dim": 24, "kernel": 4}
        layer = GatedDeltaNet(32, **shape, eps=1e-6, dtype=torch.float32)
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
        return layer.to(DEVICE)

    def results(self, layer, backend):
        """Of two steps, the first of which begins what the second goes on with."""
        torch.manual_seed(1)
        cache = RecurrentCache(
            torch.full((4, 3, layer.channels), torch.nan, device=DEVICE),
            torch.full((4, 2, 16, 24), torch.nan, device=DEVICE),
        )
        begun = make_batch([Run(slot, 0, (0,) * 6, (slot,)) for slot in (3, 0)], 64)
        batch = replace(make_batch(self.runs, 64), num_drafts=(0, 2, 0))
        outs = [
            layer(torch.randn(batch.num_tokens, 32).to(DEVICE), Step(batch, backend), cache)
            for batch in (begun, batch)
        ]
        layer.settle(torch.tensor([3]), cache)
        return *outs, cache.state[[0, 1, 3]]

    def test_it_gives_what_it_gives_with_torch(self, layer):
        found, expected = (self.results(layer, backend) for backend in ("triton", "torch"))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
