"""schemathesis against the whole front: whatever it asks, no answer is a 5xx, and each is what the
document says. Few cases; `python -m tools.fuzz api` asks thousands."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio

from kttrio.config import ServerConfig
from tests import http_front
from tools.fuzz.api import ApiConfig, command

SECONDS = 300


async def test_the_document_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(http_front, "SECONDS", SECONDS)
    config = ServerConfig(access_log=False)
    async with http_front.running_front(config=config, context_length=64) as front:
        asked = command(front.url, ApiConfig(examples=3, coverage=False))
        done = await trio.run_process(
            asked, check=False, capture_stdout=True, stderr=subprocess.STDOUT, cwd=tmp_path
        )
        await front.idle()
    assert done.returncode == 0, done.stdout.decode()
