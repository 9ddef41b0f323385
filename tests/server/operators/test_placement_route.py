"""The route that saves the experts in use, over a placement that does as it is told."""

from __future__ import annotations

from pathlib import Path

from tests.http_front import running_front

ROUTE = "/save_expert_placement"


class FakePlacement:
    num_swaps = 7

    def __init__(self) -> None:
        self.full = False

    def save(self) -> Path:
        if self.full:
            raise OSError(28, "No space left on device", "/state/placement.pt")
        return Path("/state/placement.pt")


async def test_the_answer_names_the_file() -> None:
    async with running_front() as front:
        front.state.placement = FakePlacement()
        answer = await front.ask("POST", ROUTE)
        assert answer.status == 200
        assert answer.json() == {"file": "/state/placement.pt", "swaps": 7}


async def test_without_updates_the_answer_says_which_flag() -> None:
    async with running_front() as front:
        answer = await front.ask("POST", ROUTE)
        assert (answer.status, answer.error()["code"]) == (409, "placement_unavailable")
        assert "--kt-enable-dynamic-expert-update" in answer.error()["message"]


async def test_what_cannot_be_written_is_told() -> None:
    async with running_front() as front:
        front.state.placement = placement = FakePlacement()
        placement.full = True
        answer = await front.ask("POST", ROUTE)
        assert (answer.status, answer.error()["code"]) == (500, "save_failed")
        assert "No space left on device: '/state/placement.pt'" in answer.error()["message"]


async def test_to_look_is_not_to_save() -> None:
    async with running_front() as front:
        front.state.placement = FakePlacement()
        assert (await front.ask("GET", ROUTE)).status == 405
