"""What the bench of divided models finds, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table

from tools.bench.handoffs import HandoffCell


@dataclass(frozen=True, slots=True)
class DecodeCell:
    way: str
    sequences: int
    captured: bool
    milliseconds: float
    """Of a step: the median."""
    microseconds_per_layer: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class PrefillCell:
    way: str
    tokens: int
    seconds: float
    tokens_per_second: float
    sent_gigabytes: float
    """Of experts, to the device."""
    link_share: float
    """Of what the link can carry in that time."""


@dataclass(slots=True)
class Findings:
    """All that was measured."""

    model: str = ""
    link_gigabytes_per_second: float = 0.0
    decode: list[DecodeCell] = field(default_factory=list)
    prefill: list[PrefillCell] = field(default_factory=list)
    handoff: list[HandoffCell] = field(default_factory=list)


def print_tables(findings: Findings, console: Console) -> None:
    link = f"the link to the device carries {findings.link_gigabytes_per_second:.1f} GB/s"
    for table in (
        decode_table(findings.decode, findings.model),
        prefill_table(findings.prefill, link),
        handoff_table(findings.handoff),
    ):
        if table.rows:
            console.print(table)


def decode_table(cells: Sequence[DecodeCell], model: str) -> Table:
    headings = ("sequences", "steps", "ms", "us/layer", "tok/s", "beside first")
    table = new_table("Decode", model, headings)
    first = {cell.sequences: cell.milliseconds for cell in reversed(cells)}
    for cell in cells:
        table.add_row(
            cell.way,
            str(cell.sequences),
            shown(cell.captured),
            f"{cell.milliseconds:.2f}",
            f"{cell.microseconds_per_layer:.0f}",
            f"{cell.tokens_per_second:.1f}",
            f"{cell.milliseconds / first[cell.sequences]:.3f}",
        )
    return table


def prefill_table(cells: Sequence[PrefillCell], link: str) -> Table:
    headings = ("tokens", "s", "tok/s", "GB sent", "of the link")
    table = new_table("Prefill", link, headings)
    for cell in cells:
        table.add_row(
            cell.way,
            str(cell.tokens),
            f"{cell.seconds:.3f}",
            f"{cell.tokens_per_second:.0f}",
            f"{cell.sent_gigabytes:.2f}",
            f"{cell.link_share:.0%}" if cell.sent_gigabytes else "",
        )
    return table


def handoff_table(cells: Sequence[HandoffCell]) -> Table:
    why = "what a layer pays for one token to ask the host, whose expert is next to nothing"
    table = new_table("Hand-off", why, ("steps", "us"))
    for cell in cells:
        table.add_row(cell.way, shown(cell.captured), f"{cell.microseconds:.1f}")
    return table


def new_table(title: str, caption: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def shown(captured: bool) -> str:
    return "captured" if captured else "plain"
