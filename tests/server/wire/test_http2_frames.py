"""What is seen of frames before anything is made of them."""

from __future__ import annotations

import pytest
import trio
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given
from hypothesis import strategies as st

from kttrio.server.wire.http2_frames import (
    MAX_FRAME,
    PREFACE,
    FrameScan,
    Patience,
    RuleBroken,
    goodbye,
)

BUSY = [HeadersFrame(1, b"head"), DataFrame(1, b"body" * 100)]
IDLE = [
    DataFrame(1),
    PingFrame(opaque_data=bytes(8)),
    SettingsFrame(settings={3: 1}),
    RstStreamFrame(1),
    WindowUpdateFrame(0, window_increment=1),
]


@given(st.lists(st.sampled_from(BUSY + IDLE)), st.lists(st.integers(1, 50), max_size=30))
def test_frames_are_counted_however_their_bytes_are_cut(
    frames: list[Frame], cuts: list[int]
) -> None:
    wire = PREFACE + b"".join(frame.serialize() for frame in frames)
    scan, count = FrameScan(), 0
    for cut in cuts:
        count += scan.count_idle(wire[:cut])
        wire = wire[cut:]
    count += scan.count_idle(wire)
    assert count == sum(frame in IDLE for frame in frames)


def test_a_frame_that_is_too_long_is_refused_at_its_head() -> None:
    scan = FrameScan()
    most = MAX_FRAME.to_bytes(3, "big") + b"\0\0\0\0\0\1"
    assert scan.count_idle(PREFACE + most + bytes(MAX_FRAME)) == 0
    with pytest.raises(RuleBroken, match="16385 bytes"):
        scan.count_idle((MAX_FRAME + 1).to_bytes(3, "big") + b"\0\0\0\0\0\1")


async def test_patience_comes_back_with_time_and_with_answers(autojump_clock: object) -> None:

    patience = Patience(left=2)
    patience.bear(2)
    with pytest.raises(RuleBroken):
        patience.bear(1)
    await trio.sleep(1)
    patience.bear(90)
    patience.earn(20)
    patience.bear(20)
    with pytest.raises(RuleBroken):
        patience.bear(20)


def test_a_goodbye_names_the_last_stream_and_the_reason() -> None:
    assert goodbye(7, 11) == GoAwayFrame(0, last_stream_id=7, error_code=11).serialize()
