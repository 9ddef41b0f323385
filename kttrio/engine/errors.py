"""Why the engine refuses a request. The server turns each into its own HTTP status."""

from __future__ import annotations


class RequestTooLarge(Exception):
    """The request could never run here, however long it waited (400)."""


class QueueFull(Exception):
    """As many requests wait as may wait (429)."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which a place is likely to be free."""


class EngineClosed(Exception):
    """The engine takes no more requests: it drains, has stopped, or has died (503)."""
