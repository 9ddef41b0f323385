"""Counting who is chosen, and what happens between steps."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kttrio.device.host import HostDevice
from kttrio.experts.block import MoEBlock
from kttrio.experts.choice import DecayedCounts, DecayedRule, LastChunkRule, Seat, StepTokens, Swap
from kttrio.experts.routing import SoftmaxRouter
from kttrio.experts.state import ExpertState
from kttrio.experts.update import Tally, Updater
from tests.experts.test_swaps import EXPERTS, LAYERS, NUM_ON_HOSTS, RESIDENT, Sides, sides
from tests.reference import TorchExperts

TOP_K = 2


def new_block() -> MoEBlock:
    wide = torch.zeros(EXPERTS, 4, 8)
    return MoEBlock(
        8,
        router=SoftmaxRouter(EXPERTS, TOP_K, renormalise=True),
        shared="none",
        shared_size=0,
        experts=TorchExperts(wide, wide, wide.mT.contiguous()),
        dtype=torch.float32,
    )


@pytest.fixture
def blocks() -> list[MoEBlock]:
    torch.manual_seed(3)
    made = [new_block() for _ in range(LAYERS)]
    for block in made:
        block.gates.copy_(torch.randn(EXPERTS, 8))
    return made


@pytest.fixture
def state(tmp_path: Path) -> ExpertState:
    return ExpertState(tmp_path / "placement.pt", range(LAYERS), (LAYERS, EXPERTS))


def choose(blocks: list[MoEBlock], *ids: list[list[int]]) -> None:
    """As a step would that routes like that."""
    for block, chosen in zip(blocks, ids, strict=True):
        for listener in block.listeners:
            listener(torch.tensor(chosen, dtype=torch.int32))


def test_counts_are_those_of_the_routings(blocks: list[MoEBlock]) -> None:
    tally = Tally(blocks, HostDevice())
    expected = torch.zeros(LAYERS, EXPERTS, dtype=torch.int32)
    with torch.inference_mode():
        for num_tokens in (7, 1, 20):
            x = torch.randn(num_tokens, 8)
            for block, row in zip(blocks, expected, strict=True):
                block(x)
                row += (x @ block.gates.T).topk(TOP_K).indices.flatten().bincount(minlength=EXPERTS)
        assert tally.seen() is None, "nobody looked"
        tally.look()
        assert torch.equal(tally.seen(), expected)
        assert tally.seen() is None
        tally.look()
        assert not tally.seen().any()


def test_choices_that_are_none_do_not_count(blocks: list[MoEBlock]) -> None:
    tally = Tally(blocks, HostDevice())
    choose(blocks, [[-1, 2]], [[-1, -1]], [[0, 5]])
    tally.look()
    seen = tally.seen()
    assert seen is not None
    assert [row.nonzero().flatten().tolist() for row in seen] == [[2], [], [0, 5]]


class Machine:
    """Steps that choose experts, and an updater over real layers between them."""

    def __init__(self, there: Sides, blocks: list[MoEBlock], rule, state) -> None:
        self.there, self.blocks = there, blocks
        self.updater = Updater(Tally(blocks, there.device), rule, there.swapper, state)

    def step(self, *ids: list[list[int]], prompt: int = 0) -> None:
        choose(self.blocks, *ids)
        self.updater.between_steps(StepTokens(len(ids[0]), prompt))
        self.there.check()

    def steps(self, number: int, *ids: list[list[int]]) -> None:
        for _ in range(number):
            self.step(*ids)

    def residents(self) -> list[list[int]]:
        return [layer.residency.mask.nonzero().flatten().tolist() for layer in self.there.layers]


def decayed(known: Tensor | None = None) -> DecayedRule:
    """Looks at every token."""
    if known is None:
        known = torch.zeros(LAYERS, EXPERTS)
    counts = DecayedCounts(known, top_k=TOP_K, half_life=100)
    return DecayedRule(counts, margin=0.0, every_tokens=1)


USED = ([[4, 5]], [[4, 5]], [[3, 4]])


def wait(machine: Machine, wanted: list[list[int]]) -> None:
    """Steps until the experts that are used are on the device."""
    for _ in range(10_000):
        if machine.residents() == wanted and machine.there.swapper.is_idle:
            return
        machine.step(*USED)
    raise AssertionError(f"{machine.residents()} after 10,000 steps, not {wanted}")


def test_those_that_are_used_come_to_the_device(blocks: list[MoEBlock], state: ExpertState) -> None:
    with sides() as there:
        machine = Machine(there, blocks, decayed(), state)
        wait(machine, [[4, 5], [4, 5], [3, 4]])
        before = machine.updater.num_swaps
        assert before >= 6
        machine.steps(50, *USED)
        assert machine.updater.num_swaps == before, "all is as it should be"
        assert there.num_on_hosts() == NUM_ON_HOSTS


def test_the_last_large_step_decides_under_its_rule(
    blocks: list[MoEBlock], state: ExpertState
) -> None:
    rule = LastChunkRule((LAYERS, EXPERTS), threshold=3)
    with sides() as there:
        machine = Machine(there, blocks, rule, state)
        machine.steps(20, *USED)
        assert machine.updater.num_swaps == 0, "no step was large"
        machine.step(*([[2, 3]] * 3 for _ in range(LAYERS)), prompt=3)
        wait(machine, [[2, 3]] * LAYERS)


class Broken:
    """A rule that wants what cannot be."""

    drops, counts = False, torch.zeros(LAYERS, EXPERTS)

    def wants(self, step: StepTokens) -> bool:
        return False

    def add(self, counts: Tensor) -> None:
        raise AssertionError("nobody looked")

    def choose(self, mask: Tensor, limit: int) -> list[Swap]:
        return [Swap(Seat(0, 5), Seat(1, 0)), Swap(Seat(2, 0), Seat(0, 0))]


def test_a_swap_that_fails_ends_the_update_and_nothing_else(
    blocks: list[MoEBlock], state: ExpertState, caplog: pytest.LogCaptureFixture
) -> None:
    """The second one would take from the host what is not there."""
    with sides() as there:
        machine = Machine(there, blocks, Broken(), state)
        for _ in range(100):
            machine.step(*USED)
        assert sum(map(len, machine.residents())) == LAYERS * RESIDENT
        machine.updater.close()
        assert there.num_on_hosts() == NUM_ON_HOSTS
    assert caplog.text.count("stay as they are from now on") == 1


def test_what_is_known_is_kept_on_demand_and_in_the_end(
    blocks: list[MoEBlock], state: ExpertState
) -> None:
    with sides() as there:
        machine = Machine(there, blocks, decayed(), state)
        machine.steps(3, *USED)
        assert machine.updater.save() == state.path
        known = state.read()
        assert known is not None
        assert [row.nonzero().flatten().tolist() for row in known] == [[4, 5], [4, 5], [3, 4]]
        machine.steps(3, *USED)
        machine.updater.close()
        later = state.read()
        assert later is not None
        assert int(later.sum()) > int(known.sum())
        machine.updater.close()


def test_who_has_seen_nothing_keeps_nothing(blocks: list[MoEBlock], state: ExpertState) -> None:
    with sides() as there:
        Machine(there, blocks, decayed(), state).updater.close()
    assert not state.path.exists()


def test_an_end_that_cannot_be_written_is_told(
    blocks: list[MoEBlock], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    state = ExpertState(tmp_path / "file" / "placement.pt", range(LAYERS), (LAYERS, EXPERTS))
    with sides() as there, caplog.at_level(logging.WARNING):
        machine = Machine(there, blocks, decayed(), state)
        machine.step(*USED)
        machine.updater.close()
    assert "is lost" in caplog.text
