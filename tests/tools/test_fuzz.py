"""What tools.fuzz feeds: a little of it in every test run, with hypothesis and with atheris."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.fuzz import targets
from tools.fuzz.parsers import ALL

ROOT = Path(__file__).parents[2]


def mutated(seed: bytes, dice: random.Random) -> bytes:
    """The seed with some bytes changed, left out, put in or repeated."""
    data = bytearray(seed)
    for _ in range(dice.randrange(4)):
        at = dice.randrange(len(data) + 1)
        end = min(len(data), at + dice.choice([0, 1, 1, 2, 30]))
        data[at:end] = dice.choice([b"", dice.randbytes(1), dice.randbytes(4), data[at:end] * 2])
    return bytes(data)


@pytest.mark.parametrize("name", ALL)
def test_nothing_fails_over_wild_bytes(name: str) -> None:
    target, make_seeds = targets.TARGETS[name]
    seeds = list(make_seeds()) or [b""]

    @settings(max_examples=60)
    @given(st.binary(max_size=200), st.sampled_from(seeds), st.randoms(use_true_random=False))
    def check(wild: bytes, seed: bytes, dice: random.Random) -> None:
        target(wild)
        target(mutated(seed, dice))

    check()


@pytest.mark.parametrize("name", ALL)
def test_seeds_are_taken(name: str) -> None:
    target, make_seeds = targets.TARGETS[name]
    for seed in make_seeds():
        target(seed)


@pytest.mark.parametrize(
    ("target", "data", "attribute"),
    [
        (targets.TARGETS["calls"][0], b"\0\0abc", "_parsed"),
        (targets.TARGETS["reasoning"][0], b"\0\0abc", "_split"),
    ],
    ids=["calls", "reasoning"],
)
def test_what_depends_on_cuts_is_found(
    target: Callable[[bytes], None],
    data: bytes,
    attribute: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def count(*given: object) -> list[int]:
        return [len(pieces) for pieces in given if isinstance(pieces, list)]

    monkeypatch.setattr(targets, attribute, count)
    with pytest.raises(AssertionError):
        target(data)


def test_atheris_finds_nothing() -> None:
    pytest.importorskip("atheris", reason="atheris is not installed: pip install '.[test]'")
    argv = ["-m", "tools.fuzz", "parsers", "--seconds", "3", "--only", "any"]
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing failed" in done.stdout
