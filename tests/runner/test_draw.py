from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kttrio.runner.draw import (
    DrawParams,
    draw_filtered,
    draw_unfiltered,
    ordered_topk,
    uniforms,
)


def draw_params(rows, *, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, uniform=None):
    if uniform is None:
        uniform = uniforms(range(rows), [0] * rows)
    return DrawParams(
        np.full(rows, temperature),
        np.full(rows, top_p),
        np.full(rows, top_k, dtype=np.int64),
        np.full(rows, min_p),
        np.asarray(uniform, dtype=np.float64),
    )


def kept_by_the_book(logits, *, temperature, top_p, top_k, min_p):
    """Token ids that survive, best first, and their probabilities: plain Python, float64."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    if top_k:
        order, weights = order[:top_k], weights[:top_k]
    total, before, kept = sum(weights), 0.0, 0
    for weight in weights:
        if kept and ((top_p < 1.0 and before >= top_p * total) or weight < min_p):
            break
        before += weight
        kept += 1
    return order[:kept], [weight / before for weight in weights[:kept]]


def random_logits(rows, vocab, *, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


class TestUniforms:
    def test_each_depends_on_its_own_pair_only(self):
        seeds, positions = [3, 2**63, -1, 3], [0, 5, 2**40, 1]
        together = uniforms(seeds, positions)
        alone = [uniforms([s], [p])[0] for s, p in zip(seeds, positions, strict=True)]
        assert together.tolist() == alone
        assert len(set(alone)) == 4

    def test_seeds_of_any_size_are_taken_modulo_64_bits(self):
        assert uniforms([-1], [7]) == uniforms([2**64 - 1], [7])
        assert uniforms([2**200 + 5], [7]) == uniforms([5], [7])

    @pytest.mark.parametrize("axis", ["seed", "position"])
    def test_they_are_uniform_and_neighbours_are_independent(self, axis):
        count = 20_000
        run, fixed = range(count), [11] * count
        values = uniforms(run, fixed) if axis == "seed" else uniforms(fixed, run)
        assert values.min() >= 0.0
        assert values.max() < 1.0
        found = np.histogram(values, bins=50, range=(0, 1))[0]
        chi_square = float(((found - count / 50) ** 2 / (count / 50)).sum())
        assert chi_square < 90  # 49 degrees of freedom: exceeded once in 3000
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


class TestOrderedTopk:
    @given(
        values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
        k=st.integers(1, 45),
    )
    def test_ties_go_by_id_wherever_they_fall(self, values, k):
        logits = torch.tensor([values, values[::-1]], dtype=torch.float32)
        found, ids = ordered_topk(logits, k)
        for row, row_values, row_ids in zip(
            logits.tolist(), found.tolist(), ids.tolist(), strict=True
        ):
            expected = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
            assert row_ids == expected
            assert row_values == [row[i] for i in expected]

    def test_a_row_of_equal_values(self):
        _, ids = ordered_topk(torch.zeros(2, 5000), 20)
        assert ids.tolist() == [list(range(20))] * 2


FILTERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 1.0, 2.0]),
        "top_p": st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0]),
        "top_k": st.sampled_from([0, 1, 2, 7, 31, 40, 300, 1000]),
        "min_p": st.sampled_from([0.0, 0.001, 0.3, 1.0]),
    }
)


class TestDraws:
    @settings(max_examples=60, deadline=None)
    @given(
        filters=FILTERS,
        vocab=st.sampled_from([5, 33, 300, 1200]),
        scale=st.sampled_from([0.2, 3.0]),
        seed=st.integers(0, 999),
    )
    def test_only_what_the_filters_keep_is_drawn(self, filters, vocab, scale, seed):
        logits = random_logits(3, vocab, seed=seed, scale=scale)
        uniform = uniforms([seed] * 3, [0, 1, 2])
        # A draw at the very end of the mass shows the last token that is kept.
        uniform[2] = 1.0 - 2.0**-53
        tokens = draw_filtered(logits, draw_params(3, uniform=uniform, **filters)).tolist()
        for row, token in zip(logits.tolist(), tokens, strict=True):
            # The boundary of top_p may lie within the rounding of the weights.
            looser = {**filters, "top_p": min(filters["top_p"] * (1 + 1e-5), 1.0)}
            assert token in kept_by_the_book(row, **looser)[0]

    @pytest.mark.parametrize("vocab", [300, 5000])
    @pytest.mark.parametrize("scale", [0.0, 0.05, 3.0])
    @pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95])
    def test_the_share_of_top_p_ends_at_the_right_token(self, vocab, scale, top_p):
        """Few tokens are drawn best first, many in the order of ids; also where all are equal."""
        logits = random_logits(1, vocab, seed=4, scale=scale)
        kept, _ = kept_by_the_book(
            logits[0].tolist(), temperature=1.0, top_p=top_p, top_k=0, min_p=0.0
        )
        first, last = (
            int(draw_filtered(logits, draw_params(1, top_p=top_p, uniform=[u]))[0])
            for u in (0.0, 1.0 - 2.0**-53)
        )
        assert (first, last) in [(kept[0], kept[-1]), (min(kept), max(kept))]

    @pytest.mark.parametrize(
        "filters",
        [
            {},
            {"temperature": 0.5},
            {"top_k": 6},
            {"top_p": 0.7},
            {"min_p": 0.1},
            {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 1.5},
        ],
    )
    def test_frequencies_follow_the_probabilities(self, filters):
        draws = 20_000
        logits = random_logits(1, 40, seed=8, scale=1.0)
        draw = draw_filtered if set(filters) - {"temperature"} else draw_unfiltered
        params = draw_params(draws, uniform=uniforms([5] * draws, range(draws)), **filters)
        tokens = draw(logits.expand(draws, -1).contiguous(), params).tolist()
        book = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, **filters}
        kept, probabilities = kept_by_the_book(logits[0].tolist(), **book)
        assert set(tokens) <= set(kept)
        chi_square = sum(
            (tokens.count(token) - draws * p) ** 2 / (draws * p)
            for token, p in zip(kept, probabilities, strict=True)
        )
        freedom = len(kept) - 1
        assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5

    @pytest.mark.parametrize("scale", [0.1, 2.0])
    def test_frequencies_follow_the_probabilities_where_many_tokens_are_kept(self, scale):
        draws = 1500
        logits = random_logits(1, 600, seed=9, scale=scale)
        uniform = uniforms([6] * draws, range(draws))
        tokens = [
            int(draw_filtered(logits, draw_params(1, top_p=0.97, uniform=[u]))[0]) for u in uniform
        ]
        kept, probabilities = kept_by_the_book(
            logits[0].tolist(), temperature=1.0, top_p=0.97, top_k=0, min_p=0.0
        )
        mass = dict(zip(kept, probabilities, strict=True))
        bins = [sum(mass.get(token, 0.0) for token in range(i, i + 60)) for i in range(0, 600, 60)]
        found = np.histogram(tokens, bins=10, range=(0, 600))[0]
        chi_square = sum(
            (f - draws * p) ** 2 / (draws * p) for f, p in zip(found, bins, strict=True)
        )
        assert chi_square < 9 + 5 * math.sqrt(18)

    @pytest.mark.parametrize("draw", [draw_filtered, draw_unfiltered])
    @pytest.mark.parametrize("vocab", [33, 5003])
    def test_a_row_is_drawn_alike_in_every_batch(self, draw, vocab):
        rows = 18
        logits = (random_logits(rows, vocab, seed=3, scale=1.5) * 8).round() / 8  # many ties
        top_p = np.linspace(0.2, 1.0, rows)
        whole = draw_params(rows)
        whole = DrawParams(
            np.linspace(0.5, 2.0, rows),
            top_p,
            np.arange(rows, dtype=np.int64) * 17 % 60,
            np.where(np.arange(rows) % 3 == 0, 0.02, 0.0),
            whole.uniform,
        )
        together = draw(logits, whole).tolist()
        order = list(reversed(range(rows)))
        assert draw(logits[order], whole.rows(order)).tolist() == together[::-1]
        alone = [int(draw(logits[i : i + 1], whole.rows([i]))[0]) for i in range(rows)]
        assert alone == together

    def test_extreme_temperatures(self):
        logits = random_logits(1, 50)
        best = int(logits.argmax())
        cold = draw_params(1, temperature=1e-300, uniform=[0.999])
        assert int(draw_unfiltered(logits, cold)[0]) == best
        hot = [
            int(draw_unfiltered(logits, draw_params(1, temperature=1e30, uniform=[u]))[0])
            for u in np.arange(0.01, 1.0, 0.02)
        ]
        assert hot == list(range(50))

    @pytest.mark.parametrize("draw", [draw_filtered, draw_unfiltered])
    def test_infinitely_unlikely_tokens_are_never_drawn(self, draw):
        logits = torch.full((1, 300), -torch.inf)
        logits[0, [17, 203]] = 1.0
        drawn = [
            int(draw(logits, draw_params(1, top_p=0.9999, uniform=[u]))[0]) for u in (0.0, 0.4, 0.6)
        ]
        assert drawn == [17, 17, 203]
