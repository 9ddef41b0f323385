from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.formats import fp8
from kttrio.weights.loader import (
    Countdown,
    ExpertWeights,
    Part,
    Weight,
    check_names,
    check_parts,
    fill,
    stacks_blocks,
    stored_bytes,
)


def parameter(*shape):
    return nn.Parameter(torch.full(shape, torch.nan), requires_grad=False)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = parameter(3, 2)
        self.norm = parameter(2)


WEIGHTS = (
    Weight("both", (Part("one", (1, 2)), Part("two", (2, 2)))),
    Weight("norm", (Part("n", (2,)),), lambda weight: weight + 1),
)
PARTS = [part for weight in WEIGHTS for part in weight.parts]


@pytest.fixture
def directory(tmp_path):
    packed = fp8.quantize(torch.tensor([[3.0, 4.0], [5.0, 6.0]]), 128)
    tensors = {
        "one": torch.tensor([[1.0, 2.0]]).bfloat16(),
        "two": packed.data,
        "two_scale_inv": packed.scale,
        "n": torch.tensor([0.5, -0.5]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_fill_joins_dequantises_and_arranges(directory):
    module, heard = Small(), []
    with Checkpoint(directory) as checkpoint:
        check_parts(checkpoint, PARTS)
        total = stored_bytes(checkpoint, PARTS)
        fill(module, checkpoint, WEIGHTS, Countdown(total, lambda *args: heard.append(args)))
    assert module.norm.tolist() == [1.5, 0.5]
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    torch.testing.assert_close(module.both.data, expected, rtol=0.07, atol=0)
    assert heard == [(12, 20), (20, 20)]


def test_fill_demands_a_weight_for_every_parameter(directory):
    with Checkpoint(directory) as checkpoint, pytest.raises(ValueError, match="leaves out norm"):
        fill(Small(), checkpoint, WEIGHTS[:1], Countdown(0, None))


class TestFp8:
    """Parts that end with a block of 128 rows, the last of which need not."""

    @pytest.fixture
    def stored(self, tmp_path):
        packed = {
            name: fp8.quantize(torch.randn(rows, 200), 128)
            for name, rows in (("a", 128), ("b", 70))
        }
        tensors = {name: part.data for name, part in packed.items()}
        tensors |= {f"{name}_scale_inv": part.scale for name, part in packed.items()}
        save_file({**tensors, "plain": torch.zeros(128, 200)}, tmp_path / "model.safetensors")
        with Checkpoint(tmp_path) as checkpoint:
            yield checkpoint, packed

    def test_what_is_held_so_is_taken_as_it_is(self, stored):
        checkpoint, packed = stored
        module = nn.Module()
        data = torch.empty(198, 200, dtype=torch.float8_e4m3fn)
        module.weight = nn.Parameter(data, requires_grad=False)
        module.scale = parameter(2, 2)
        fill(module, checkpoint, [weight("a", "b")], Countdown(0, None))
        for part, rows, blocks in (("a", slice(128), 0), ("b", slice(128, 198), 1)):
            assert module.weight[rows].float().equal(packed[part].data.float())
            assert module.scale[blocks].equal(packed[part].scale[0])

    @pytest.mark.parametrize(
        ("names", "stacks"), [("ab", True), ("a", True), ("b", True), ("ba", False)]
    )
    def test_blocks_must_not_be_cut(self, names, stacks):
        assert stacks_blocks(weight(*names)) is stacks

    def test_rearranged_rows_have_no_blocks(self):
        turned = Weight("weight", (Part("a", (128, 200)),), lambda stored: stored.flip(0))
        assert not stacks_blocks(turned)


def weight(*names):
    rows = {"a": 128, "b": 70, "plain": 128}
    return Weight("weight", tuple(Part(name, (rows[name], 200)) for name in names))


def test_check_parts_names_what_is_missing(directory):
    with (
        Checkpoint(directory) as checkpoint,
        pytest.raises(CheckpointError, match=f"'three' is missing in {re.escape(str(directory))}"),
    ):
        check_parts(checkpoint, [*PARTS, Part("three", (1,))])


def test_check_parts_names_both_shapes(directory):
    message = r"'one' in .*model\.safetensors has shape \[1, 2\]; the config asks for \[2, 2\]"
    with Checkpoint(directory) as checkpoint, pytest.raises(CheckpointError, match=message):
        check_parts(checkpoint, [Part("one", (2, 2))])


def test_check_names_refuses_strangers_and_lets_pass_what_is_skipped(directory):
    with Checkpoint(directory) as checkpoint:
        check_names(checkpoint, {"one", "two", "n"}, ())
        check_names(checkpoint, {"one", "two"}, ("n",))
        with pytest.raises(CheckpointError, match=r"'n' in .*model\.safetensors is unexpected"):
            check_names(checkpoint, {"one", "two"}, ())
        with pytest.raises(CheckpointError, match=r"'two(_scale_inv)?' in .* is unexpected"):
            check_names(checkpoint, {"one", "n"}, ())


def test_expert_names_count_through():
    weights = ExpertWeights("g.{}", "u.{}", "d.{}", 2, hidden_size=8, intermediate_size=4)
    assert [part.name for part in weights.all_parts()] == ["g.0", "u.0", "d.0", "g.1", "u.1", "d.1"]
    assert [part.shape for part in weights.parts(0)] == [(4, 8), (4, 8), (8, 4)]
