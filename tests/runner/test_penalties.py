from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kttrio.runner.penalties import TokenCounts
from tests.runner.toy import chunk_of

VOCAB = 11
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)


def counts():
    return TokenCounts(num_slots=4, vocab_size=VOCAB, device=torch.device("cpu"))


def penalised_by_the_book(logits, prompt, output, sampling):
    found = list(logits)
    for token in range(VOCAB):
        if token in prompt or token in output:
            factor = sampling.repetition_penalty
            found[token] = found[token] / factor if found[token] > 0 else found[token] * factor
        found[token] -= sampling.frequency_penalty * output.count(token)
        found[token] -= sampling.presence_penalty * (token in output)
    return found


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(
        st.tuples(
            TOKENS,
            TOKENS,
            st.sampled_from([1.0, 1.3, 0.5]),
            st.sampled_from([0.0, 0.4, -0.4]),
            st.sampled_from([0.0, 1.5]),
            st.integers(1, 5),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_rows_equal_the_definition_however_the_tokens_arrived(data):
    table, last, expected = counts(), [], []
    logits = torch.randn(len(data), VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    for slot, (prompt, output, repetition, presence, frequency, size) in enumerate(data):
        tokens = prompt + output
        for start in range(0, len(tokens), size):
            chunk = chunk_of(
                slot,
                start=start,
                token_ids=tokens[start : start + size],
                num_prompt=len(prompt),
                repetition_penalty=repetition,
                presence_penalty=presence,
                frequency_penalty=frequency,
            )
            table.observe([chunk])
        last.append(chunk)
        expected.append(
            penalised_by_the_book(logits[slot].tolist(), prompt, output, chunk.sampling)
        )
    table.penalise(logits, last)
    torch.testing.assert_close(logits, torch.tensor(expected))


def test_a_new_sequence_inherits_nothing_from_its_slot():
    table = counts()
    table.observe([chunk_of(2, token_ids=(1, 2, 3), num_prompt=1, frequency_penalty=1.0)])
    fresh = chunk_of(2, token_ids=(4,), num_prompt=1, frequency_penalty=1.0, repetition_penalty=2.0)
    table.observe([fresh])
    logits = torch.ones(1, VOCAB)
    table.penalise(logits, [fresh])
    assert logits[0].tolist() == [0.5 if token == 4 else 1.0 for token in range(VOCAB)]


def test_the_table_exists_only_while_a_sequence_with_penalties_runs():
    table = counts()
    table.observe([chunk_of(0, token_ids=(1, 2))])
    assert not table.allocated
    table.observe([chunk_of(1, token_ids=(1, 2), presence_penalty=0.1)])
    assert table.allocated
    table.observe([chunk_of(1, token_ids=(3,)), chunk_of(0, start=2, token_ids=(3,))])
    assert not table.allocated


def test_neighbours_without_penalties_stay_as_they_are():
    table = counts()
    plain, penalised = (
        chunk_of(0, token_ids=(5,)),
        chunk_of(1, token_ids=(5,), repetition_penalty=2),
    )
    table.observe([plain, penalised])
    logits = torch.ones(2, VOCAB)
    table.penalise(logits, [plain, penalised])
    assert logits[:, 5].tolist() == [1.0, 0.5]
    assert logits[0].tolist() == [1.0] * VOCAB
