"""Failures in the log: where and what, and their words for who debugs."""

from __future__ import annotations

import logging

import pytest

from kttrio.server.failures import log_failure

logger = logging.getLogger("tests.failures")


def a_failure() -> Exception:
    """A group of a failure with a cause and one with a context."""
    found = []
    for is_cause in (True, False):
        try:
            try:
                {}["the word"]
            except KeyError as error:
                if is_cause:
                    raise ValueError("the word") from error
                raise TypeError("the word")  # noqa: B904
        except (ValueError, TypeError) as error:
            found.append(error)
    return ExceptionGroup("the word", found)


def test_places_and_types_without_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log_failure(logger, "it failed", a_failure())
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    text = record.getMessage()
    assert text.startswith("it failed\n")
    assert text.count("builtins.KeyError") == 2
    for name in ("ExceptionGroup", "ValueError", "TypeError"):
        assert text.count(f"builtins.{name}") == 1
    assert "in a_failure" in text
    assert "the word" not in text.replace('{}["the word"]', "").replace('("the word")', "")


def test_a_silenced_context_stays_silent(caplog: pytest.LogCaptureFixture) -> None:
    try:
        try:
            raise KeyError
        except KeyError:
            raise ValueError from None
    except ValueError as error:
        log_failure(logger, "it failed", error)
    assert "KeyError" not in caplog.text.replace("except KeyError", "")


def test_words_are_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    log_failure(logger, "it failed", ValueError("the word"))
    assert "ValueError: the word" in caplog.text
