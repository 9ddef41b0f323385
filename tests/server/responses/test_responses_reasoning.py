"""Reasoning that clients carry: it comes back as it went, and nothing else is taken for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kttrio.server.responses.reasoning import carried, carry


@given(st.text())
def test_it_comes_back(text: str) -> None:
    assert carried(carry(text)) == text


@pytest.mark.parametrize("other", ["", "gAAAAB", carry("a")[1:], carry("abc")[:-1], "kttrio1./w=="])
def test_what_another_wrote_is_none_of_ours(other: str) -> None:
    assert carried(other) is None


@given(st.text())
def test_nothing_that_a_client_sends_raises(text: str) -> None:
    assert carried("kttrio1." + text) is None or isinstance(carried("kttrio1." + text), str)
