"""How failures of our own are logged: where and what, but not in the exception's words. Those may
be a client's, from a prompt, a tool's name or a key, and are told at the level debug alone."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator

FAILED = "The server failed to answer; its log says why."
"""What the client is told of it."""


def log_failure(logger: logging.Logger, message: str, error: BaseException) -> None:
    """Log `message` as an error, with the places and types of `error` and all that led to it."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.error("%s", message, exc_info=error)
    else:
        logger.error("%s\n%s", message, "\n".join(_told(one) for one in _chain(error)))


def _told(error: BaseException) -> str:
    places = "".join(traceback.format_tb(error.__traceback__))
    return f"{places}{type(error).__module__}.{type(error).__qualname__}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """What came first, last."""
    yield error
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _chain(one)
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _chain(before)
