from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kttrio.plan import StepPlan
from kttrio.runner.tensors import StepBuilder
from tests.runner.toy import PAGE_SIZE, chunk_of


def build(*chunks):
    builder = StepBuilder(page_size=PAGE_SIZE, device=torch.device("cpu"))
    return builder.build(StepPlan(chunks))


def test_chunks_of_one_token_come_first_and_keep_their_order():
    step = build(
        chunk_of(0, token_ids=(1, 2, 3)),
        chunk_of(1, start=5, token_ids=(9,)),
        chunk_of(2, token_ids=(4, 5)),
        chunk_of(3, token_ids=(7,)),
    )
    assert step.order == (1, 3, 0, 2)
    assert step.batch.num_decodes == 2
    assert step.batch.token_ids.tolist() == [9, 7, 1, 2, 3, 4, 5]
    assert step.batch.positions.tolist() == [5, 0, 0, 1, 2, 0, 1]
    assert step.batch.slots.tolist() == [1, 3, 0, 2]
    assert (step.batch.starts, step.batch.lengths) == ((5, 0, 0, 0), (1, 1, 3, 2))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), min_size=1, max_size=9))
def test_every_token_has_its_own_place_in_its_own_pages(spans):
    chunks = [
        chunk_of(slot, start=start, token_ids=range(length))
        for slot, (start, length) in enumerate(spans)
    ]
    step = build(*chunks)
    expected_index, expected_positions = [], []
    for chunk in step.chunks:
        for position in range(chunk.start, chunk.start + len(chunk.token_ids)):
            page, offset = divmod(position, PAGE_SIZE)
            expected_index.append(chunk.pages[page] * PAGE_SIZE + offset)
            expected_positions.append(position)
    assert step.batch.kv_index.tolist() == expected_index
    assert step.batch.positions.tolist() == expected_positions
    for row, chunk in zip(step.batch.page_table.tolist(), step.chunks, strict=True):
        padding = len(row) - len(chunk.pages)
        assert row == [*chunk.pages, *[0] * padding]


def test_a_known_page_table_is_not_mistaken_for_another_sequences():
    builder = StepBuilder(page_size=PAGE_SIZE, device=torch.device("cpu"))
    first = chunk_of(3, token_ids=(1,))
    grown = chunk_of(3, start=8, token_ids=(1,))
    tables = [
        builder.build(StepPlan((chunk,))).batch.page_table.tolist()
        for chunk in (first, first, grown, first)
    ]
    assert tables == [[list(chunk.pages)] for chunk in (first, first, grown, first)]


def test_a_chunk_beyond_its_pages_is_refused():
    chunk = chunk_of(2, token_ids=(1, 2))
    too_long = type(chunk)(2, 4, (1, 2), chunk.pages, chunk.sampling, True, 6)
    with pytest.raises(ValueError, match=r"slot 2 ends at position 6, beyond its 1 pages"):
        build(too_long)


def test_a_chunk_without_tokens_is_refused():
    with pytest.raises(ValueError, match="slot 5 has no token"):
        build(chunk_of(5, token_ids=()))
