"""Stop strings: ends a stream of text where one of them appears, also across token boundaries.

Not here: stop *ids*, which the engine watches.
"""

from __future__ import annotations

from collections.abc import Iterable

from kttrio.text.markers import Markers


class StopStrings:
    """Watches one stream. Holds back only text with which a stop string may begin."""

    __slots__ = ("_held", "_include", "_markers", "matched")

    def __init__(self, stops: Iterable[str], *, include_in_output: bool = False) -> None:
        """Raises ValueError for an empty stop string."""
        self._markers = Markers(stops)
        self._include = include_in_output
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the stream."""

    def push(self, text: str) -> tuple[str, str | None]:
        """What may be shown now, and the stop string if one is complete: the text ends there."""
        if self.matched is not None:
            return "", self.matched
        if not self._held and not self._markers.may_begin(text):
            return text, None
        text = self._held + text
        found = self._markers.find_first_complete(text)
        if found:
            place, self.matched = found
            self._held = ""
            return text[: place + self._include * len(self.matched)], self.matched
        cut = len(text) - self._markers.held(text)
        self._held = text[cut:]
        return text[:cut], None

    def finish(self) -> str:
        """The text still held, when the stream ended for another reason."""
        text, self._held = self._held, ""
        return text
