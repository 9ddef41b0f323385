"""Masks on their last way: from their makers to the logits, and to what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kttrio.runner import masks
from kttrio.runner.masks import NOTHING_ALLOWED, forbid, wait_for
from kttrio.runner.sampler import Sampler
from tests.fakes import MadeMasks, mask_of
from tests.runner.toy import chunk_of

CPU = torch.device("cpu")


def allowed_by(bits, vocab_size):
    return np.flatnonzero(np.unpackbits(bits, bitorder="little")[:vocab_size]).tolist()


def masks_of(*masks, vocab_size=20, num_drafts=0):
    chunk = chunk_of()._replace(masks=MadeMasks(masks), num_drafts=num_drafts)
    return wait_for(chunk, vocab_size=vocab_size)


class TestWaiting:
    @given(st.integers(1, 70), st.sets(st.integers(0, 80), min_size=1))
    def test_masks_are_made_to_fit_the_vocabulary(self, vocab_size, tokens):
        (mask,) = masks_of(mask_of(tokens), vocab_size=vocab_size)
        known = sorted(token for token in tokens if token < vocab_size)
        if known:
            assert len(mask) == -(-vocab_size // 8)
            assert allowed_by(mask, len(mask) * 8) == known
        else:
            assert mask == NOTHING_ALLOWED

    def test_no_mask_allows_all(self):
        assert wait_for(chunk_of(), vocab_size=20) == (None,)
        assert masks_of(None) == (None,)

    def test_there_is_one_for_each_place(self):
        free, even, nothing = masks_of(None, mask_of([2, 4]), b"\0\0", num_drafts=2)
        assert (free, nothing) == (None, NOTHING_ALLOWED)
        assert allowed_by(even, 20) == [2, 4]

    def test_a_wrong_number_of_them_is_an_error_at_each_place(self):
        wrong = "1 masks were made for 3 places"
        assert masks_of(None, num_drafts=2) == (wrong,) * 3

    def test_what_cannot_be_made_is_an_error_at_each_place(self):
        chunk = chunk_of()._replace(masks=MadeMasks("boom"), num_drafts=1)
        assert wait_for(chunk, vocab_size=20) == ("boom", "boom")


@pytest.mark.parametrize("vocab_size", [1, 8, 13, 64, 97])
@pytest.mark.parametrize("masked", [[0], [2], [0, 1, 2], [1, 2]])
def test_what_may_not_come_is_lost_and_the_rest_untouched(vocab_size, masked):
    logits = torch.randn(3, vocab_size)
    allowed = {row: sorted({0, row * 3 % vocab_size, vocab_size - 1}) for row in masked}
    masks = {
        row: masks_of(mask_of(tokens), vocab_size=vocab_size)[0] for row, tokens in allowed.items()
    }
    expected = logits.clone()
    for row, tokens in allowed.items():
        lost = [token for token in range(vocab_size) if token not in tokens]
        expected[row, lost] = -torch.inf
    forbid(logits, masks)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("free", [[], [3]])
def test_many_rows_of_a_large_vocabulary_are_done_in_parts(free, monkeypatch):
    monkeypatch.setattr(masks, "_BLOCK_ELEMENTS", 250)
    logits = torch.randn(7, 100)
    expected, held = logits.clone(), {}
    for row in set(range(7)) - {*free}:
        held[row] = masks_of(mask_of([row, 99]), vocab_size=100)[0]
        expected[row, [token for token in range(99) if token != row]] = -torch.inf
    forbid(logits, held)
    assert torch.equal(logits, expected)


DRAWS = [
    {"temperature": 0.0},
    {"temperature": 1.5},
    {"temperature": 0.01},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 300},
    {"top_p": 0.9},
    {"top_p": 0.5, "temperature": 3.0},
    {"top_p": 0.99, "temperature": 9.0},
    {"min_p": 0.1},
    {"top_p": 0.8, "top_k": 40, "min_p": 0.01},
    {"temperature": 0.7, "logprobs": 2},
]
VOCAB = 600


def draw(logits, chunks, masks=None):
    sampler = Sampler(num_slots=len(DRAWS), vocab_size=logits.shape[-1], device=CPU)
    sampler.observe(chunks)
    return sampler.sample(logits.clone(), chunks, masks)


@given(
    num_allowed=st.lists(
        st.sampled_from([1, 2, 20, 40, 280, 400, VOCAB]),
        min_size=len(DRAWS),
        max_size=len(DRAWS),
    ),
    free=st.sets(st.integers(0, len(DRAWS) - 1)),
    seed=st.integers(0, 2**32),
    rounded=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_masked_draw_is_a_plain_draw_where_all_else_is_out_of_reach(
    num_allowed, free, seed, rounded
):
    """Whatever filters it: logits far below the others come to the same, and need no mask."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(DRAWS), VOCAB, generator=generator) * 3
    if rounded:  # as a bfloat16 head leaves them: full of ties
        logits = logits.bfloat16().float()
    chunks = [chunk_of(i, seed=seed + i, **changes) for i, changes in enumerate(DRAWS)]
    far, masks = logits.clone(), {}
    for row, count in enumerate(num_allowed):
        if row not in free:
            order = torch.randperm(VOCAB, generator=generator)
            far[row, order[count:]] = -1e6
            masks[row] = masks_of(mask_of(order[:count].tolist()), vocab_size=VOCAB)[0]
    together = draw(logits, chunks, masks).tokens.tolist()
    assert together == draw(far, chunks).tokens.tolist()
    for row, mask in masks.items():
        assert together[row] in allowed_by(mask, VOCAB)
        (alone,) = draw(logits[row : row + 1], [chunks[row]], {0: mask}).tokens.tolist()
        assert alone == together[row]


def greedy_among(logits, allowed, *, chunk=None):
    mask = masks_of(mask_of(allowed), vocab_size=logits.shape[-1])[0]
    return draw(logits, [chunk or chunk_of(temperature=0.0)], {0: mask})


class TestOrder:
    """A mask comes after all that a request says about single tokens."""

    def test_no_bias_lets_in_what_the_mask_forbids(self):
        chunk = chunk_of(temperature=0.0, logit_bias=((7, 1e6), (3, 100.0)))
        found = greedy_among(torch.zeros(1, 40), [1, 3, 5], chunk=chunk)
        assert found.tokens.tolist() == [3]

    def test_a_bias_against_the_only_token_left_changes_nothing(self):
        chunk = chunk_of(temperature=1.0, logit_bias=((5, -100.0),))
        assert greedy_among(torch.zeros(1, 40), [5], chunk=chunk).tokens.tolist() == [5]

    @pytest.mark.parametrize("draws", DRAWS, ids=str)
    def test_banned_stops_come_where_nothing_else_may(self, draws):
        stops = {"stop_token_ids": frozenset({5, 9}), "min_tokens": 4}
        chunk = chunk_of(token_ids=(1, 2), num_prompt=2, **draws, **stops)
        found = greedy_among(torch.randn(1, VOCAB), [5], chunk=chunk)
        assert found.tokens.tolist() == [5]
        assert bool(found.best.isfinite().all())
        found = greedy_among(torch.randn(1, VOCAB), [5, 9, 20], chunk=chunk)
        assert found.tokens.tolist() == [20], "and not where something else may"

    def test_penalties_are_those_of_the_plain_answer(self):
        chunk = chunk_of(token_ids=(3, 1), temperature=0.0, repetition_penalty=4.0)
        logits = torch.tensor([[9.0, 1.0, 1.5, 5.0, 1.4, 9.0]])
        assert greedy_among(logits, [2, 3, 4], chunk=chunk).tokens.tolist() == [2]

    def test_logprobs_are_the_models_own(self):
        logits = torch.randn(1, 40)
        found = greedy_among(logits, [7], chunk=chunk_of(temperature=0.0, logprobs=3))
        own, best = logits.double().log_softmax(-1)[0], logits.argmax()
        assert float(found.scores[0, 0]) == pytest.approx(float(own[7]), abs=1e-5)
        assert int(found.scores[0, 4]) == int(best)


def test_logits_that_broke_where_it_counts_are_reported():
    logits = torch.randn(1, 40)
    logits[0, 7] = torch.nan
    assert not bool(greedy_among(logits, [7, 8]).best.isfinite().all())
