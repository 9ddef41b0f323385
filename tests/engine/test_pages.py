from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.engine.pages import PagePool


def test_takes_and_gives_back():
    pool = PagePool(4)
    first = pool.take(3)
    assert sorted(first) == [0, 1, 2]
    assert pool.num_free == 1
    pool.give_back(first)
    assert pool.num_free == pool.num_pages == 4


def test_too_many_pages_take_nothing():
    pool = PagePool(2)
    with pytest.raises(ValueError, match="3 pages wanted, 2 of 2 free"):
        pool.take(3)
    assert pool.num_free == 2


@pytest.mark.parametrize("page", [0, 1, -1, 2])
def test_page_that_is_not_taken_is_refused(page):
    pool = PagePool(2)
    pool.give_back(pool.take(1))
    with pytest.raises(ValueError, match=f"page {page} is given back but was not taken"):
        pool.give_back((page,))
    assert pool.num_free == 2


def test_double_return_is_an_error():
    pool = PagePool(3)
    pages = pool.take(2)
    pool.give_back(pages)
    with pytest.raises(ValueError, match="not taken"):
        pool.give_back(pages)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60))
def test_no_page_has_two_owners(moves):
    pool, held = PagePool(16), []
    for take, count in moves:
        if take and count <= pool.num_free:
            held.append(pool.take(count))
        elif not take and held:
            pool.give_back(held.pop(count % len(held)))
        owned = [page for pages in held for page in pages]
        assert len(set(owned)) == len(owned)
        assert pool.num_free == 16 - len(owned)
