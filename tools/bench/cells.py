"""What the expert bench found, and how it is shown. No measuring here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from rich import box
from rich.console import Console
from rich.table import Table

NOISE = 0.9  # times the time of fewer tokens; below that something fell


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer at one number of tokens; medians, bytes and operations per second."""

    shape: str
    weight_format: str
    group_size: int
    activation: str
    isa: str
    tokens: int
    milliseconds: float
    best_milliseconds: float
    num_forwards: int
    num_experts: float
    """Distinct experts of a forward, on average."""
    read: float
    read_limit: float
    """Measured between the forwards."""
    operations: float
    operations_limit: float
    error: float
    """Relative, against fp32 with the same weights."""

    @property
    def name(self) -> str:
        group = f"/{self.group_size}" if self.weight_format.startswith("int") else ""
        return f"{self.weight_format}{group} x {self.activation}"


def report_cells(cells: Sequence[Cell], console: Console) -> None:
    for (isa, shape), group in groupby(cells, lambda cell: (cell.isa, cell.shape)):
        console.print(new_table(f"{shape}, {isa}", list(group)))
    for line in falls(cells):
        console.print(line, style="red", markup=False)


def new_table(title: str, cells: Sequence[Cell]) -> Table:
    caption = "ms; GB/s of experts touched and share of what is read; T(FL)OP/s and share of peak"
    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False
    )
    table.add_column("tokens")
    tokens = sorted({cell.tokens for cell in cells})
    for num_tokens in tokens:
        table.add_column(str(num_tokens), justify="right")
    table.add_column("error", justify="right")
    for name, row in groupby(cells, lambda cell: cell.name):
        shown = {cell.tokens: cell for cell in row}
        error = max(cell.error for cell in shown.values())
        weights, activation = name.split(" x ")
        table.add_row(
            f"{weights}\nx {activation}",
            *(show(shown[num_tokens]) for num_tokens in tokens),
            f"{error:.1e}",
        )
    return table


def show(cell: Cell) -> str:
    milliseconds, operations = cell.milliseconds, cell.operations / 1e12
    return (
        f"{milliseconds:.{2 if milliseconds < 100 else 0}f}\n"
        f"{cell.read / 1e9:.1f} {cell.read / cell.read_limit:.0%}\n"
        f"{operations:.3f} {cell.operations / cell.operations_limit:.0%}"
    )


def falls(cells: Sequence[Cell]) -> Iterator[str]:
    """More tokens must not take less time."""
    for fewer, more in pairwise(cells):
        same = (fewer.isa, fewer.shape, fewer.name) == (more.isa, more.shape, more.name)
        ratio = more.milliseconds / fewer.milliseconds
        if same and more.tokens > fewer.tokens and ratio < NOISE:
            yield (
                f"{more.isa} {more.shape} {more.name}: {more.tokens} tokens take {ratio:.2f} times "
                f"as long as {fewer.tokens}"
            )
