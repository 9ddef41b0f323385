"""The bench of what experts on a device serve: its arithmetic, and as a whole on small traffic."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from rich.console import Console

from kttrio.config import ConfigError
from kttrio.experts.choice import DecayedCounts, DecayedRule
from kttrio.experts.recording import write_stat
from tools import synthetic
from tools.bench import coverage, traffic
from tools.bench.coverage import (
    DYNAMIC,
    STATIC,
    TENTHS,
    CoverageConfig,
    Follower,
    judge,
    measure,
    run,
)
from tools.bench.lines import draw_lines
from tools.bench.traffic import Traffic

LAYERS, EXPERTS, TOP_K = 3, 20, 2


def drawn(shares, num_steps, num_tokens=16):
    """Steps whose tokens choose by `shares` [layers, experts]."""
    rows = [
        row.multinomial(num_tokens * TOP_K, replacement=True).bincount(minlength=EXPERTS)
        for _ in range(num_steps)
        for row in shares
    ]
    return torch.stack(rows).view(num_steps, LAYERS, EXPERTS)


@pytest.fixture
def skewed():
    """A few of the last experts are used most."""
    torch.manual_seed(0)
    shares = torch.full((LAYERS, EXPERTS), 0.02)
    shares[:, -3:] = 1.0
    return Traffic(drawn(shares, 120), TOP_K)


def halves(seen):
    return [Traffic(steps, seen.top_k) for steps in seen.steps.tensor_split(2)]


def test_what_is_known_beats_what_is_not(skewed):
    row = judge(*halves(skewed), 0.15, CoverageConfig(half_life=1000))
    assert set(row.shares) == {*STATIC, *DYNAMIC}
    assert row.shares["frequency"] > 0.85
    assert row.shares["dynamic"] > 0.85
    assert row.shares["last-chunk"] == row.shares["uniform"], "no step was large"
    assert row.shares["uniform"] < 0.2
    assert row.shares["uniform"] < row.shares["cold"] < row.shares["dynamic"]
    assert row.num_swaps >= 9
    assert row.num_chunk_swaps == 0


def test_the_last_chunk_follows_large_steps(skewed):
    row = judge(*halves(skewed), 0.15, CoverageConfig(threshold=16))
    assert row.shares["last-chunk"] > 0.8


def test_a_step_is_served_before_its_swaps():
    counts = torch.tensor([[[0, 6]], [[0, 6]], [[3, 3]]])
    rule = DecayedRule(DecayedCounts(torch.zeros(1, 2), top_k=1), margin=0.0, every_tokens=1)
    follower = Follower(rule, torch.tensor([[True, False]]), top_k=1)
    assert follower.follow(counts, lanes=1) == (0 + 6 + 3) / 18
    assert follower.num_swaps == 1


def test_layers_and_steps_without_experts_are_left_out(skewed):
    steps = skewed.steps
    with_dense = torch.cat((torch.zeros_like(steps[:, :1]), steps), 1)
    padded = Traffic(torch.cat((with_dense, torch.zeros_like(with_dense[:7]))), TOP_K)
    console = Console(width=160)
    with console.capture() as capture:
        rows = measure(padded, CoverageConfig(), "some", console)
    assert "some: 3 layers of 20 experts" in capture.get()
    assert "in 120 steps" in capture.get()
    assert [row.ratio for row in rows] == list(TENTHS)
    assert rows == measure(skewed, CoverageConfig(), "some", Console(quiet=True))


def test_a_recording_becomes_a_table_a_picture_and_numbers(skewed, tmp_path, capsys):
    file = write_stat(tmp_path, skewed.steps.int())
    plot, numbers = tmp_path / "lines.png", tmp_path / "numbers.json"
    flags = [f"--plot={plot}", f"--json={numbers}", f"--top-k={TOP_K}"]
    assert run([f"--recording={file}", *flags]) == 0
    assert "frequency" in capsys.readouterr().out, "where there are 80 columns"
    (rows,) = json.loads(numbers.read_text()).values()
    assert len(rows) == len(TENTHS)
    with Image.open(plot) as picture:
        assert picture.width > 500


@pytest.mark.parametrize(("flags", "missing"), [([], "give --top-k"), (["--top-k=2"], "No such")])
def test_what_a_recording_lacks_is_told(tmp_path, flags, missing):
    with pytest.raises(ConfigError, match=missing):
        run([f"--recording={tmp_path / 'nothing.pt'}", *flags])


def test_a_line_is_where_its_points_are():
    picture = draw_lines({"a": {"up": [(0.0, 0.0), (1.0, 1.0)]}}, x="x", y="y")
    size = coverage.draw_lines({"a": {}, "b": {}}, x="x", y="y").size
    assert size == (2 * picture.width, picture.height)
    middle = (76 + 260, 56 + 260)
    assert picture.getpixel(middle) == (150, 150, 150)


def test_models_are_recorded(monkeypatch):
    tiny = synthetic.config(layers=3, experts=8, hidden=64, intermediate=32)
    monkeypatch.setattr(traffic, "SHAPE", tiny | {"num_experts_per_tok": 2})
    read, top_k = traffic.synthetic_traffic(2)
    assert (read.shape[1:], top_k) == ((3, 8), 2)
    assert int(read[:, 0].sum(1).max()) == traffic.STEP_TOKENS * 2
    assert torch.equal(read.sum(2), read[:, :1].sum(2).expand(-1, 3))
    answered, top_k = traffic.demo_traffic(3)
    assert (answered.shape[1:], top_k) == ((8, 16), 4)
    assert answered[-1, 0].sum() <= 3 * 4, "answers come token by token"
