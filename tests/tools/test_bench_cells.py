"""What the expert bench makes of its numbers."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from tools.bench.cells import Cell, falls, new_table

CELL = Cell(
    shape="deepseek-v3.2",
    weight_format="int4",
    group_size=64,
    activation="int8",
    isa="avx2_base",
    tokens=1,
    milliseconds=2.0,
    best_milliseconds=1.5,
    num_forwards=9,
    num_experts=8.0,
    read=15e9,
    read_limit=30e9,
    operations=0.05e12,
    operations_limit=0.2e12,
    error=1.25e-2,
)


def test_a_cell_shows_time_and_shares_of_both_limits() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(new_table("t", [CELL, replace(CELL, tokens=4, error=1.5e-2)]))
    lines = capture.get().splitlines()
    assert any("int4/64" in line and "2.00" in line for line in lines)
    assert any("x int8" in line and "15.0 50%" in line for line in lines)
    assert any("0.050 25%" in line for line in lines)
    assert "1.5e-02" in capture.get()  # the worst of the row


def test_only_groups_that_were_chosen_are_named() -> None:
    assert CELL.name == "int4/64 x int8"
    assert replace(CELL, weight_format="fp8", group_size=128).name == "fp8 x int8"


def test_a_fall_is_less_time_for_more_tokens_of_the_same_layer() -> None:
    more = replace(CELL, tokens=4, milliseconds=1.0)
    (line,) = falls([CELL, more])
    assert line == ("avx2_base deepseek-v3.2 int4/64 x int8: 4 tokens take 0.50 times as long as 1")
    assert not list(falls([CELL, replace(more, milliseconds=1.9)]))
    assert not list(falls([CELL, replace(more, activation="bfloat16")]))
