"""Writes the README's table of what becomes of each request field, from the records that read them.

    python -m tools.field_table

A test compares, so that the table cannot be old.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from kttrio.server.app import PROTOCOLS
from kttrio.server.asking.forms import GuidedFields
from kttrio.server.schema.records import FieldStance, Stance, stances

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- fields: written by python -m tools.field_table -->"
END = "<!-- end of fields -->"
SHARED = frozenset(one._replace(help="") for one in stances(GuidedFields))
"""What other servers' clients send with any request; a few endpoints differ in some of it."""


def table() -> str:
    """The table in Markdown: each endpoint's fields that are done, refused and ignored."""
    lines = ["| endpoint | | fields |", "|---|---|---|"]
    lines += _rows("shared by those with *", GuidedFields, frozenset())
    for body, paths in _bodies().items():
        shares = frozenset(map(_name, SHARED)) <= frozenset(map(_name, stances(body)))
        head = "<br>".join(f"`{path}`{' *' if shares else ''}" for path in paths)
        lines += _rows(head, body, SHARED if shares else frozenset())
    return "\n".join(lines)


def _name(one: FieldStance) -> str:
    return one.name


def _bodies() -> dict[type, list[str]]:
    """The paths of each kind of body."""
    found: dict[type, list[str]] = {}
    for operation in chain.from_iterable(protocol.OPERATIONS for protocol in PROTOCOLS):
        if operation.body is not None:
            found.setdefault(operation.body, []).append(operation.path)
    return found


def _rows(head: str, body: type, known: frozenset[FieldStance]) -> Iterator[str]:
    """A row for each stance, of the fields that are not known to have it."""
    news = [one for one in stances(body) if one._replace(help="") not in known]
    for stance in Stance:
        names = [f"`{one.name}`" for one in news if one.stance is stance]
        if names:
            yield f"| {head} | {stance} | {', '.join(names)} |"
            head = ""


def with_table(text: str) -> str:
    """A README with today's table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text("utf-8")), "utf-8")
