"""The README's table of fields is today's."""

from __future__ import annotations

from tools.field_table import README, table, with_table


def test_the_readme_has_todays_table() -> None:
    text = README.read_text("utf-8")
    assert with_table(text) == text, "run python -m tools.field_table"


def test_every_stance_is_told() -> None:
    rows = table().splitlines()
    chat = next(i for i, row in enumerate(rows) if row.startswith("| `/v1/chat/completions` *"))
    for i, (stance, name) in enumerate(
        [("done", "messages"), ("refused", "functions"), ("ignored", "verbosity")]
    ):
        assert f"| {stance} | " in rows[chat + i]
        assert f"`{name}`" in rows[chat + i]


def test_what_is_shared_is_told_once_and_differences_beside_it() -> None:
    rows = table().splitlines()
    assert sum("`temperature`" in row for row in rows) == 2  # Anthropic's has a range of its own
    refused = [row for row in rows if "| refused |" in row and "`return_token_ids`" in row]
    assert refused, "/v1/responses has no token ids"
