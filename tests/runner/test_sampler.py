from __future__ import annotations

import random

import pytest
import torch

from kttrio.runner.logprobs import read_scores
from kttrio.runner.sampler import Sampler, output_position
from tests.runner.toy import chunk_of

VOCAB = 500


def logits_of(rows, *, seed=0, vocab=VOCAB):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sample(logits, chunks):
    sampler = Sampler(num_slots=32, vocab_size=logits.shape[-1], device=torch.device("cpu"))
    sampler.observe(chunks)
    return sampler.sample(logits.clone(), chunks)


def tokens_of(logits, *chunks):
    return sample(logits, chunks).tokens.tolist()


MIXED = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_p": 0.9},
    {"top_p": 0.9, "top_k": 20},
    {"top_k": 50, "temperature": 2.0},
    {"min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"logit_bias": ((3, 5.0), (4, -100.0))},
    {"min_tokens": 4, "stop_token_ids": frozenset({1, 2, 3})},
    {"logprobs": 3},
    {"top_k": 1},
    {"top_p": 0.99, "temperature": 3.0},
    {"top_p": 0.5, "min_p": 0.2, "logprobs": 0},
    {"top_k": 400, "top_p": 0.95},
    {"repetition_penalty": 0.8, "logprobs": 20},
    {"temperature": 1.3, "logit_bias": ((9, 2.5),)},
    {"top_p": 0.3},
]


def mixed_chunks():
    return [
        chunk_of(slot, token_ids=range(slot, slot + 6), num_prompt=4, seed=100 + slot, **changes)
        for slot, changes in enumerate(MIXED)
    ]


class TestBatchIndependence:
    @pytest.mark.parametrize("rounded", [False, True])
    def test_alone_in_company_and_in_any_order(self, rounded):
        logits = logits_of(len(MIXED), seed=5)
        if rounded:  # as a bfloat16 head leaves them: full of ties
            logits = logits.bfloat16().float()
        chunks = mixed_chunks()
        together = tokens_of(logits, *chunks)
        for row, chunk in enumerate(chunks):
            assert tokens_of(logits[row : row + 1], chunk) == [together[row]]
        order = list(range(len(chunks)))
        random.Random(1).shuffle(order)
        shuffled = tokens_of(logits[order], *[chunks[row] for row in order])
        assert shuffled == [together[row] for row in order]

    def test_the_slot_does_not_matter(self):
        logits = logits_of(1)
        drawn = {tokens_of(logits, chunk_of(slot, temperature=2.0))[0] for slot in range(9)}
        assert len(drawn) == 1

    def test_seed_and_output_position_do(self):
        logits = logits_of(1, seed=2) / 10
        by_seed = {tokens_of(logits, chunk_of(seed=seed))[0] for seed in range(40)}
        by_position = {
            tokens_of(logits, chunk_of(start=start, token_ids=(1,), num_prompt=1))[0]
            for start in range(40)
        }
        assert len(by_seed) > 20
        assert len(by_position) > 20

    def test_the_length_of_the_prompt_does_not(self):
        logits = logits_of(1, seed=2) / 10
        first = [
            tokens_of(logits, chunk_of(token_ids=range(1, length + 1))) for length in range(1, 12)
        ]
        assert first == first[:1] * 11


def test_output_position_counts_from_the_prompts_end():
    assert output_position(chunk_of(token_ids=(1, 2, 3), num_prompt=3)) == 0
    assert output_position(chunk_of(start=3, token_ids=(1,), num_prompt=3)) == 1
    assert output_position(chunk_of(start=9, token_ids=(1,), num_prompt=3)) == 7


class TestGreedy:
    def test_ties_go_to_the_lowest_id(self):
        logits = torch.zeros(1, VOCAB)
        logits[0, [400, 40, 90]] = 2.0
        assert tokens_of(logits, chunk_of(temperature=0.0)) == [40]
        assert tokens_of(logits, chunk_of(top_k=1, temperature=5.0)) == [40]

    def test_filters_and_seed_do_not_matter(self):
        logits = logits_of(4)
        chunks = [
            chunk_of(slot, temperature=0.0, top_p=0.1, top_k=9, min_p=0.9, seed=slot)
            for slot in range(4)
        ]
        assert tokens_of(logits, *chunks) == logits.argmax(-1).tolist()


class TestLogitChanges:
    def test_a_bias_forces_and_forbids(self):
        logits = logits_of(3)
        best = int(logits[1].argmax())
        chunks = [
            chunk_of(0, temperature=0.0, logit_bias=((7, 100.0),)),
            chunk_of(1, temperature=0.0, logit_bias=((best, -100.0),)),
            chunk_of(2, temperature=0.0),
        ]
        second = int(logits[1].topk(2).indices[1])
        assert tokens_of(logits, *chunks) == [7, second, int(logits[2].argmax())]

    def test_a_bias_follows_its_request_not_its_slot(self):
        sampler = Sampler(num_slots=4, vocab_size=VOCAB, device=torch.device("cpu"))
        logits = logits_of(1)
        drawn = [
            sampler.sample(logits.clone(), [chunk_of(temperature=0.0, logit_bias=((id, 99.0),))])
            for id in (3, 5)
        ]
        assert [int(found.tokens[0]) for found in drawn] == [3, 5]

    def test_ids_beyond_the_vocabulary_name_no_token(self):
        logits = logits_of(1)
        chunk = chunk_of(
            temperature=0.0,
            logit_bias=((VOCAB, 100.0), (10**9, 100.0)),
            min_tokens=3,
            stop_token_ids=frozenset({VOCAB + 5}),
        )
        assert tokens_of(logits, chunk) == [int(logits.argmax())]

    def test_min_tokens_bans_the_stop_ids_until_then(self):
        logits = torch.zeros(1, VOCAB)
        logits[0, 8], logits[0, 9], logits[0, 20] = 30.0, 29.0, 10.0
        stops = {"stop_token_ids": frozenset({8, 9}), "min_tokens": 2}
        drawn = [
            tokens_of(logits, chunk_of(start=start, num_prompt=3, token_ids=(1,) * size, **stops))[
                0
            ]
            for start, size in ((0, 3), (3, 1), (4, 1))
        ]
        assert drawn[:2] == [20, 20]
        assert drawn[2] in (8, 9)

    def test_banning_every_token_still_draws_one(self):
        logits = logits_of(1)
        chunk = chunk_of(stop_token_ids=frozenset(range(VOCAB)), min_tokens=9, top_p=0.9)
        found = sample(logits, [chunk])
        assert 0 <= int(found.tokens[0]) < VOCAB
        assert bool(torch.isfinite(found.best).all())

    def test_penalties_count_the_prompt_and_the_output_of_earlier_steps(self):
        sampler = Sampler(num_slots=2, vocab_size=VOCAB, device=torch.device("cpu"))
        logits = torch.zeros(1, VOCAB)
        logits[0, :4] = torch.tensor([5.0, 4.9, 4.8, 4.7])
        drawn, start = [], 0
        token_ids = (0, 7)  # token 0 stands in the prompt: repeated, so never the best
        for _ in range(3):
            chunk = chunk_of(
                start=start,
                token_ids=token_ids,
                num_prompt=2,
                temperature=0.0,
                repetition_penalty=3.0,
            )
            sampler.observe([chunk])
            drawn.append(int(sampler.sample(logits.clone(), [chunk]).tokens[0]))
            start, token_ids = start + len(token_ids), (drawn[-1],)
        assert drawn == [1, 2, 3]


class TestLogprobs:
    def test_they_are_those_of_the_raw_logits(self):
        logits = logits_of(len(MIXED), seed=11)
        chunks = mixed_chunks()
        found = sample(logits, chunks)
        assert found.scored == tuple(
            row for row, changes in enumerate(MIXED) if "logprobs" in changes
        )
        tokens = [int(found.tokens[row]) for row in found.scored]
        counts = [chunks[row].sampling.logprobs for row in found.scored]
        records = read_scores(tokens, found.scores.numpy(), counts)
        expected = logits.double().log_softmax(-1)
        for row, record, count in zip(found.scored, records, counts, strict=True):
            assert record.logprob == pytest.approx(float(expected[row, record.token]), abs=1e-5)
            assert len(record.top) == count
            best = expected[row].topk(count)
            assert [token for token, _ in record.top] == best.indices.tolist()
            assert [value for _, value in record.top] == pytest.approx(
                best.values.tolist(), abs=1e-5
            )

    def test_they_sum_to_one_over_a_small_vocabulary(self):
        logits = logits_of(2, vocab=12)
        chunks = [
            chunk_of(slot, logprobs=20, temperature=0.3, logit_bias=((2, 9.0),))
            for slot in range(2)
        ]
        found = sample(logits, chunks)
        for record in read_scores(found.tokens.tolist(), found.scores.numpy(), [20, 20]):
            assert len(record.top) == 12
            total = sum(torch.tensor([value for _, value in record.top]).exp().tolist())
            assert total == pytest.approx(1.0, abs=1e-5)
            assert (record.token, record.logprob) in record.top


def test_broken_logits_are_reported_not_hidden():
    logits = logits_of(3)
    logits[1, 5] = torch.nan
    chunks = [chunk_of(0), chunk_of(1, top_p=0.9), chunk_of(2, temperature=0.0)]
    found = sample(logits, chunks)
    assert torch.isfinite(found.best).tolist() == [True, False, True]
