"""What is known of the experts in use, from one run to the next."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from kttrio.experts.recording import read_counts
from kttrio.experts.state import ExpertState, state_file

COUNTS = torch.tensor([[0.4, 7.6, 3.0], [2.5, 0.0, 1e6]])


@pytest.fixture
def state(tmp_path: Path) -> ExpertState:
    return ExpertState(tmp_path / "deep" / "placement.pt", [1, 3], (4, 3))


def test_what_is_written_is_read_as_whole_numbers_of_all_layers(state: ExpertState) -> None:
    state.write(COUNTS)
    expected = [[0, 0, 0], [0, 8, 3], [0, 0, 0], [2, 0, 1_000_000]]
    known = state.read()
    assert known is not None
    assert known.tolist() == expected
    assert read_counts(state.path).tolist() == [expected], "a recording of one step"


def test_it_is_replaced_as_a_whole(state: ExpertState, monkeypatch: pytest.MonkeyPatch) -> None:
    state.write(COUNTS)
    state.write(2 * COUNTS)
    known = state.read()
    assert known is not None
    assert known.tolist()[1] == [1, 15, 6]

    def fill_disk(*_: object) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "save", fill_disk)
    with pytest.raises(OSError, match="no space left"):
        state.write(COUNTS)
    still = state.read()
    assert still is not None
    assert torch.equal(still, known)
    assert [path.name for path in state.path.parent.iterdir()] == ["placement.pt"]


def test_what_cannot_take_its_place_is_not_left_behind(state: ExpertState) -> None:
    state.path.mkdir(parents=True)
    with pytest.raises(OSError, match=r"placement\.pt"):
        state.write(COUNTS)
    assert [path.name for path in state.path.parent.iterdir()] == ["placement.pt"]


def test_the_first_run_knows_nothing(state: ExpertState, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert state.read() is None
    assert "is not there yet" in caplog.text


@pytest.mark.parametrize(
    ("layers", "shape"), [([1, 3], (4, 4)), ([1, 3], (5, 3)), ([0, 3], (4, 3))]
)
def test_another_models_is_said_aloud(
    state: ExpertState,
    layers: list[int],
    shape: tuple[int, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ExpertState(state.path, layers, shape).write(torch.ones(len(layers), shape[1]))
    assert state.read() is None
    assert "of another model" in caplog.text


def test_damage_is_said_aloud(state: ExpertState, caplog: pytest.LogCaptureFixture) -> None:
    state.write(COUNTS)
    state.path.write_bytes(state.path.read_bytes()[:100])
    assert state.read() is None
    assert "no torch file" in caplog.text


def test_a_checkpoint_has_a_file_of_its_own(tmp_path: Path) -> None:
    one, other = (state_file(tmp_path, print_ * 64) for print_ in "ab")
    assert one != other
    assert one.parent == other.parent == tmp_path
