from __future__ import annotations

from kttrio.layers.triton.scratch import columns_at_once, scratch_bytes, tokens_at_once

SIZES = (2048, 512)


def test_few_tokens_take_what_they_need():
    expected = 160 * 512 * 2 + 160 * 2048 * 4 + 16 * 2048 * 2
    assert scratch_bytes(16, 10, SIZES, 2) == expected


def test_more_tokens_take_no_more_memory():
    """A long prompt goes in pieces; each of the two kinds has 64 MiB."""
    most = scratch_bytes(10_000, 10, SIZES, 2)
    assert scratch_bytes(1_000_000, 10, SIZES, 2) == most
    assert most <= (128 << 20) + 10_000 * 2048 * 2


def test_pieces_are_whole_and_large_enough_to_go_on():
    assert tokens_at_once(10, 512, 2) == 6553
    assert tokens_at_once(1 << 20, 1 << 20, 2) == 1
    assert columns_at_once(10, 2048) == 2048
    assert columns_at_once(65_536, 2048) == 256
    assert columns_at_once(1 << 30, 2048) == 128
