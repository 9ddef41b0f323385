"""A real `kttrio serve` on the embedded demo model, in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).parents[2]
START_SECONDS = 180
STOP_SECONDS = 60


@dataclass
class Server:
    """A running server; `output` is what it printed until it listened."""

    process: subprocess.Popen[str]
    url: str
    output: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120
        )

    def stop(self) -> int:
        """SIGTERM, and the exit code that follows."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


@contextmanager
def running_server(*flags: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "kttrio", "serve", "--port", "0", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line)
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                break
        else:
            pytest.fail("the server ended before it listened:\n" + "".join(lines))
        watchdog.cancel()
        reader = threading.Thread(target=process.stdout.read)  # never let the pipe fill up
        reader.start()
        yield Server(process, found.group(), "".join(lines))
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
    reader.join()
    process.stdout.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The server that all tests share which do not end it."""
    with running_server() as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as shared:
        yield shared


@pytest.fixture(scope="session")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id
