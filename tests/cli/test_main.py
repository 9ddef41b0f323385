"""The dispatch: subcommands, usage and exit codes."""

from __future__ import annotations

from importlib import import_module

import pytest

from kttrio.cli.main import SUBCOMMANDS, run


def test_every_subcommand_has_a_module_with_run() -> None:
    for name in SUBCOMMANDS:
        assert callable(import_module(f"kttrio.cli.{name}").run)


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["help"], 0)])
def test_usage_lists_the_subcommands(
    argv: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv) == code
    out = capsys.readouterr().out
    for name, text in SUBCOMMANDS.items():
        assert name in out
        assert text in out


def test_unknown_subcommand_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sevre"]) == 2
    assert "unknown subcommand 'sevre'; did you mean serve?" in capsys.readouterr().err


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_bad_usage_is_exit_code_2_in_every_subcommand(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, "--no-such-flag"]) == 2
    assert capsys.readouterr().err == f"kttrio {name}: unknown flag --no-such-flag; see --help\n"
