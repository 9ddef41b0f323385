"""The recorder on real blocks: what counts, what is kept, what is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from kttrio.experts.block import MoEBlock
from kttrio.experts.recorder import RecordedShape, Recorder, RecorderSettings
from kttrio.experts.recording import read_counts
from kttrio.experts.routing import SoftmaxRouter
from kttrio.layers.batch import Batch
from tests.batches import Tables
from tests.reference import TorchExperts

LAYERS, EXPERTS, TOP_K, HIDDEN = 4, 6, 3, 8
SHAPE = RecordedShape(LAYERS, EXPERTS, TOP_K)
WITH_EXPERTS = (1, 3)
MODES = ("stat", "stat_approx", "per_pass", "per_token")
TABLES = Tables([20, 20, 20])


class Machine:
    """Blocks, a recorder, and what they chose in each step by the blocks' own word."""

    def __init__(
        self,
        directory: Path,
        mode: str = "stat",
        num_steps: int | None = 10,
        residents: Callable[[], Tensor] | None = None,
    ) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.blocks = {layer: self._block() for layer in WITH_EXPERTS}
        settings = RecorderSettings(mode, num_steps, directory)
        self.recorder = Recorder(settings, SHAPE, self.blocks, residents)
        self.chosen: list[dict[int, Tensor]] = []

    def _block(self) -> MoEBlock:
        wide = torch.zeros(EXPERTS, 4, HIDDEN)
        block = MoEBlock(
            HIDDEN,
            router=SoftmaxRouter(EXPERTS, TOP_K, renormalise=True),
            shared="none",
            shared_size=0,
            experts=TorchExperts(wide, wide, wide.mT.contiguous()),
            dtype=torch.float32,
        )
        block.gates.copy_(torch.randn(EXPERTS, HIDDEN, generator=self.generator))
        return block

    def step(self, batch: Batch) -> None:
        with torch.inference_mode(), self.recorder.step(batch):
            self.forward(batch)

    def forward(self, batch: Batch) -> None:
        x = torch.randn(batch.num_tokens, HIDDEN, generator=self.generator)
        chosen = {}
        for layer, block in self.blocks.items():
            block(x)
            scores = x @ block.gates.T
            chosen[layer] = scores.topk(TOP_K).indices
        self.chosen.append(chosen)

    def counts(self, *steps: int) -> list[list[list[int]]]:
        """[steps, layers, experts], counted one by one."""
        found = []
        for step in steps:
            rows = [[0] * EXPERTS for _ in range(LAYERS)]
            for layer, ids in self.chosen[step].items():
                for expert in ids.flatten().tolist():
                    rows[layer][expert] += 1
            found.append(rows)
        return found

    def dumped(self) -> list[list[list[int]]]:
        path = self.recorder.dump()
        assert path is not None
        return [step for step in read_counts(path).tolist() if any(map(any, step))]


def mixed() -> Batch:
    return TABLES.batch((0, 5, 1), (2, 9, 1), (1, 0, 6))


def decodes() -> Batch:
    return TABLES.batch((0, 6, 1), (1, 6, 1))


def prompt() -> Batch:
    return TABLES.batch((2, 0, 11))


@pytest.mark.parametrize("mode", MODES)
def test_counts_are_those_of_the_routings(tmp_path: Path, mode: str) -> None:
    machine = Machine(tmp_path, mode)
    machine.recorder.start()
    for batch in (prompt(), mixed(), decodes()):
        machine.step(batch)
    assert machine.recorder.num_kept == 3
    found = machine.dumped()
    assert found == machine.counts(0, 1, 2)
    assert [sum(map(sum, step)) for step in found] == [2 * n * TOP_K for n in (11, 8, 2)]
    assert not any(found[0][0] + found[0][2]), "layers without experts"


@pytest.mark.parametrize("mode", ["stat", "stat_approx"])
def test_stat_has_a_row_for_each_step_there_was_room_for(tmp_path: Path, mode: str) -> None:
    machine = Machine(tmp_path, mode, num_steps=5)
    machine.recorder.start()
    machine.step(mixed())
    path = machine.recorder.dump()
    assert path is not None
    content = torch.load(path, weights_only=True)
    assert content["logical_count"].shape == (5, LAYERS, EXPERTS)
    assert content["logical_count"].dtype is torch.int32
    assert content["logical_count"][1:].eq(0).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_last_steps_are_kept(tmp_path: Path, mode: str) -> None:
    machine = Machine(tmp_path, mode, num_steps=2)
    machine.recorder.start()
    for _ in range(5):
        machine.step(decodes())
    assert machine.dumped() == machine.counts(3, 4)


@pytest.mark.parametrize("mode", MODES)
def test_or_all_of_them(tmp_path: Path, mode: str) -> None:
    machine = Machine(tmp_path, mode, num_steps=None)
    machine.recorder.start()
    for _ in range(12):
        machine.step(decodes())
    path = machine.recorder.dump()
    assert path is not None
    assert read_counts(path).tolist() == machine.counts(*range(12))


def test_a_record_for_each_pass(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "per_pass")
    machine.step(prompt())
    machine.recorder.start()
    machine.step(mixed())
    machine.step(decodes())
    path = machine.recorder.dump()
    assert path is not None
    assert path.name.endswith("_0.pt")
    records = torch.load(path, weights_only=True)["records"]
    assert [record["forward_pass_id"] for record in records] == [2, 3]
    for record, expected in zip(records, machine.counts(1, 2), strict=True):
        assert set(record) == {"forward_pass_id", "rank", "gatherer_key", "global_physical_count"}
        assert (record["rank"], record["gatherer_key"]) == (0, "primary")
        assert record["global_physical_count"].dtype is torch.int32
        assert record["global_physical_count"].tolist() == expected


def test_a_record_for_each_pass_with_every_tokens_choice(tmp_path: Path) -> None:
    """Any number of choices; whose they are stands beside them."""
    machine = Machine(tmp_path, "per_token")
    machine.recorder.start()
    batches = (prompt(), mixed(), decodes())
    for batch in batches:
        machine.step(batch)
    path = machine.recorder.dump()
    assert path is not None
    records = torch.load(path, weights_only=True)["records"]
    assert [record["forward_mode"] for record in records] == [1, 3, 2]
    for record, batch, chosen in zip(records, batches, machine.chosen, strict=True):
        assert record["input_ids"] == batch.token_ids.tolist()
        assert record["positions"] == batch.positions.tolist()
        assert record["extend_seq_lens"] == list(batch.lengths)
        ids = record["topk_ids_of_layer"]
        assert ids.shape == (LAYERS, batch.num_tokens, TOP_K)
        assert ids.dtype is torch.int32
        for layer in range(LAYERS):
            expected = chosen.get(layer, torch.full((batch.num_tokens, TOP_K), -1))
            assert torch.equal(ids[layer].long(), expected)


@pytest.mark.parametrize("mode", ["per_pass", "per_token"])
def test_a_full_recording_takes_what_was_said(tmp_path: Path, mode: str) -> None:
    machine = Machine(tmp_path, mode, num_steps=3)
    machine.recorder.start()
    for _ in range(5):
        machine.step(prompt())
    path = machine.recorder.dump()
    assert path is not None
    values = [
        value
        for record in torch.load(path, weights_only=True)["records"]
        for value in record.values()
    ]
    tensors = sum(value.nbytes for value in values if isinstance(value, Tensor))
    listed = sum(len(value) for value in values if isinstance(value, list) and len(value) == 11)
    settings = RecorderSettings(mode, 3, tmp_path)
    assert settings.most_bytes(SHAPE, step_tokens=11) == tensors + listed * 36


def masks_of(directory: Path) -> Tensor:
    (file,) = directory.glob("gpu_expert_distribution_*.pt")
    masks = torch.load(file, weights_only=True)["gpu_expert_masks"]
    file.unlink()
    return masks


@pytest.mark.parametrize("mode", MODES)
def test_who_was_on_the_device_in_each_step_has_a_file_of_its_own(
    tmp_path: Path, mode: str
) -> None:
    now = torch.zeros(LAYERS, EXPERTS, dtype=torch.bool)
    machine = Machine(tmp_path, mode, residents=now.clone)
    machine.recorder.start()
    expected = []
    for step in range(4):
        now[1, step // 2] = True
        machine.step(decodes())
        expected.append(now.clone())
    kept = [each.residents for each in machine.recorder._kept]
    assert kept[0] is kept[1] is not kept[2] is kept[3], "steps share what did not change"
    assert machine.dumped() == machine.counts(0, 1, 2, 3)
    masks = masks_of(tmp_path)
    assert masks.dtype is torch.bool
    assert torch.equal(masks, torch.stack(expected))
    machine.step(decodes())
    machine.dumped()
    assert torch.equal(masks_of(tmp_path), now[None])


def test_a_dump_without_room_for_both_files_leaves_none(tmp_path: Path) -> None:
    machine = Machine(tmp_path, residents=lambda: torch.ones(LAYERS, EXPERTS, dtype=torch.bool))
    machine.recorder.start()
    machine.step(decodes())
    with (
        patch("kttrio.experts.recorder.write_residents", side_effect=OSError("full")),
        pytest.raises(OSError, match="full"),
    ):
        machine.recorder.dump()
    assert list(tmp_path.iterdir()) == []
    assert machine.dumped() == machine.counts(0)


def test_masks_take_memory_while_they_are_kept_and_once_more_in_a_dump(tmp_path: Path) -> None:
    for mode in MODES:
        plain = RecorderSettings(mode, 3, tmp_path).most_bytes(SHAPE, 11)
        more = RecorderSettings(mode, 3, tmp_path, with_residents=True).most_bytes(SHAPE, 11)
        assert more == plain + 3 * 2 * LAYERS * EXPERTS


def test_a_recording_of_all_steps_has_no_bound(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no bound"):
        RecorderSettings("stat", None, tmp_path).most_bytes(SHAPE, 1)


def test_only_what_lies_between_start_and_stop(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.step(mixed())
    assert (machine.recorder.is_on, machine.recorder.num_kept) == (False, 0)
    machine.recorder.start()
    assert machine.recorder.is_on
    machine.step(mixed())
    machine.recorder.stop()
    machine.step(mixed())
    assert (machine.recorder.is_on, machine.recorder.num_kept) == (False, 1)
    assert machine.dumped() == machine.counts(1)


def test_a_dump_resets_and_the_recording_goes_on(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.recorder.start()
    machine.step(mixed())
    assert machine.dumped() == machine.counts(0)
    assert machine.recorder.dump() is None
    machine.step(prompt())
    assert machine.dumped() == machine.counts(1)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_start_forgets(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.recorder.start()
    machine.step(mixed())
    machine.recorder.start()
    assert machine.recorder.dump() is None
    machine.step(mixed())
    assert machine.dumped() == machine.counts(1)


def test_a_step_that_failed_is_none(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.recorder.start()

    def fail(batch: Batch) -> None:
        with machine.recorder.step(batch):
            machine.forward(batch)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail(mixed())
    machine.forward(mixed())  # as by the layer that makes drafts: in no step's block
    assert machine.recorder.num_kept == 0
    machine.step(mixed())
    assert machine.dumped() == machine.counts(2)


@pytest.mark.parametrize("command", ["start", "stop"])
def test_a_step_under_way_at_a_command_does_not_count(tmp_path: Path, command: str) -> None:
    machine = Machine(tmp_path)
    machine.recorder.start()
    with machine.recorder.step(mixed()):
        machine.forward(mixed())
        getattr(machine.recorder, command)()
    assert machine.recorder.num_kept == 0


def test_a_step_under_way_at_a_dump_is_for_the_next_file(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.recorder.start()
    machine.step(mixed())
    with machine.recorder.step(mixed()):
        machine.forward(mixed())
        assert machine.dumped() == machine.counts(0)
    assert machine.dumped() == machine.counts(1)


def test_what_could_not_be_written_is_not_lost(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "gone")
    machine.recorder.start()
    machine.step(mixed())
    with pytest.raises(FileNotFoundError):
        machine.recorder.dump()
    (tmp_path / "gone").mkdir()
    assert machine.dumped() == machine.counts(0)


@contextmanager
def dumping(machine: Machine, paths: list[Path | None]) -> Iterator[None]:
    """Dump again and again, beside what the block does."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(0.001):
            paths.append(machine.recorder.dump())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_every_step_is_in_one_file_whatever_is_dumped_meanwhile(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "per_pass", num_steps=None)
    machine.recorder.start()
    paths: list[Path | None] = []
    with dumping(machine, paths):
        for _ in range(300):
            machine.step(decodes())
    paths.append(machine.recorder.dump())
    passes = [
        record["forward_pass_id"]
        for path in paths
        if path is not None
        for record in torch.load(path, weights_only=True)["records"]
    ]
    assert passes == list(range(1, 301))
    assert sum(path is not None for path in paths) > 1


def test_two_dumps_at_once_do_not_write_the_same(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.recorder.start()
    machine.step(mixed())
    paths: list[Path | None] = []
    threads = [
        threading.Thread(target=lambda: paths.append(machine.recorder.dump())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path is None for path in paths) == [False, True, True, True]


def test_nothing_is_gathered_while_it_is_off(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with patch.object(Recorder, "_record") as record:
        machine.step(mixed())
    record.assert_not_called()
