"""Frames of HTTP/2 as they pass, before anything is made of them: their lengths, and how many of
them ask for nothing."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import trio
from h2.errors import ErrorCodes

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_FRAME = 1 << 14
"""Bytes that a client may put into a frame: what HTTP/2 grants everybody."""
HEAD_BYTES = 9
DATA, HEADERS, GOAWAY = 0, 1, 7
IDLE_FRAMES = 1000
IDLE_FRAMES_PER_SECOND = 100.0
"""Frames that ask for nothing: so many at once, and so many a second in the long run."""

GOODBYE = struct.Struct(">xHBBIII")
"""A GOAWAY frame: length, type, flags, its stream, the last stream, why."""


class RuleBroken(Exception):
    """A client does what HTTP/2 or this server does not allow; `code` says it in HTTP/2."""

    def __init__(self, code: ErrorCodes, message: str) -> None:
        super().__init__(message)
        self.code = code


class FrameScan:
    """Follows the frames in the bytes of a client, however these are cut."""

    def __init__(self) -> None:
        self._skip = len(PREFACE)
        self._head = bytearray()

    def count_idle(self, data: bytes) -> int:
        """How many frames that ask for nothing begin in `data`: all but requests and their bodies.

        Raises RuleBroken at the head of a frame that is too long: h2 would first buffer all of it.
        """
        at = num_idle = 0
        while at < len(data):
            passed = min(self._skip, len(data) - at)
            self._skip -= passed
            at += passed
            piece = data[at : at + HEAD_BYTES - len(self._head)]
            self._head += piece
            at += len(piece)
            if len(self._head) == HEAD_BYTES:
                num_idle += self._begin()
        return num_idle

    def _begin(self) -> bool:
        """Whether the frame that begins here asks for nothing."""
        length, kind = int.from_bytes(self._head[:3], "big"), self._head[3]
        if length > MAX_FRAME:
            message = f"a frame of {length} bytes is above the limit of {MAX_FRAME}"
            raise RuleBroken(ErrorCodes.FRAME_SIZE_ERROR, message)
        self._head.clear()
        self._skip = length
        return kind not in (DATA, HEADERS) or not length


@dataclass(slots=True)
class Patience:
    """How many more idle frames are borne: it shrinks with each and comes back with time."""

    left: float = IDLE_FRAMES
    seen: float = field(default_factory=trio.current_time)

    def bear(self, num_frames: int) -> None:
        """Take so many more, or raise RuleBroken."""
        now = trio.current_time()
        earned = (now - self.seen) * IDLE_FRAMES_PER_SECOND
        self.left, self.seen = min(self.left + earned, IDLE_FRAMES) - num_frames, now
        if self.left < 0:
            message = "it sends too many frames that ask for nothing"
            raise RuleBroken(ErrorCodes.ENHANCE_YOUR_CALM, message)

    def earn(self, num_frames: int) -> None:
        """Frames that the client may send because we sent some: an answer is acknowledged."""
        self.left += num_frames


def goodbye(last_stream: int, code: int) -> bytes:
    """The frame that says that no stream after `last_stream` is served, and why."""
    return GOODBYE.pack(8, GOAWAY, 0, 0, last_stream, code)
