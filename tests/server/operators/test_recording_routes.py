"""The routes that record experts, over a recording that does as it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from kttrio.config import ServerConfig
from tests.http_front import Front, Reply, running_front

COMMANDS = ("start", "stop", "dump")


class FakeRecording:
    """Has one step after each start."""

    def __init__(self) -> None:
        self.is_on = False
        self.num_kept = 0
        self.full = False

    def start(self) -> None:
        self.is_on, self.num_kept = True, 1

    def stop(self) -> None:
        self.is_on = False

    def dump(self) -> Path | None:
        if self.full:
            raise OSError(28, "No space left on device", "/recordings/x.pt")
        if not self.num_kept:
            return None
        self.num_kept = 0
        return Path("/recordings/x.pt")


async def command(front: Front, name: str, method: str = "POST") -> Reply:
    return await front.ask(method, f"/{name}_expert_distribution_record")


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_start_stop_dump(method: str) -> None:
    async with running_front() as front:
        front.state.recording = FakeRecording()
        answers = [await command(front, name, method) for name in COMMANDS]
        assert [answer.status for answer in answers] == [200] * 3
        assert [answer.json() for answer in answers] == [
            {"recording": True, "steps": 1},
            {"recording": False, "steps": 1},
            {"recording": False, "steps": 0, "file": "/recordings/x.pt"},
        ]


@pytest.mark.parametrize("name", COMMANDS)
async def test_without_a_mode_the_answer_says_which_flag(name: str) -> None:
    async with running_front() as front:
        answer = await command(front, name)
        assert answer.status == 409
        assert answer.error()["code"] == "recording_unavailable"
        assert "--expert-distribution-recorder-mode" in answer.error()["message"]


async def test_a_dump_of_nothing_says_what_comes_first() -> None:
    async with running_front() as front:
        front.state.recording = FakeRecording()
        answer = await command(front, "dump")
        assert (answer.status, answer.error()["code"]) == (409, "nothing_recorded")
        assert "/start_expert_distribution_record" in answer.error()["message"]


async def test_a_dump_that_cannot_be_written_says_why() -> None:
    async with running_front() as front:
        front.state.recording = recording = FakeRecording()
        recording.full = True
        answer = await command(front, "dump")
        assert (answer.status, answer.error()["code"]) == (500, "dump_failed")
        assert "No space left on device: '/recordings/x.pt'" in answer.error()["message"]


async def test_the_key_guards_them() -> None:
    async with running_front(config=ServerConfig(api_key=("sesame",))) as front:
        front.state.recording = recording = FakeRecording()
        assert (await command(front, "start")).status == 401
        assert not recording.is_on
