"""A real `kttrio serve` on the embedded demo model, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import openai
import pytest

ROOT = Path(__file__).parents[2]
START_SECONDS = 180
STOP_SECONDS = 60
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
"""A tool that the demo model has learnt to call."""


class Server:
    """A running server and what it prints."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = ""
        self.output = ""
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read_output(self) -> None:
        """In a thread of its own, so that the pipe never fills up."""
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")

    def wait_for(self, pattern: str) -> str:
        """The first match in a line that is printed from now on."""
        deadline = time.monotonic() + START_SECONDS
        while line := self._lines.get(timeout=deadline - time.monotonic()):
            self.output += line
            if found := re.search(pattern, line):
                return found.group()
        raise AssertionError(f"the server ended without printing {pattern}:\n{self.output}")

    @property
    def grpc(self) -> str:
        """HOST:PORT of the gRPC port."""
        found = re.search(r"^grpc +(\S+)$", self.output, re.MULTILINE)
        assert found, self.output
        return found[1]

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
    server = Server(process)
    reader = threading.Thread(target=server.read_output)
    reader.start()
    try:
        server.url = server.wait_for(r"https?://127\.0\.0\.1:\d+")
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The server that all tests share which do not end it."""
    with running_server("--grpc-port", "0") as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as shared:
        yield shared


@pytest.fixture(scope="session")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


@pytest.fixture(scope="module")
def litellm() -> Iterator[ModuleType]:
    """The package, without its call for prices, and over an event loop that is closed: the one
    that it would make for itself is not, and some test much later would be blamed."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    with patch.dict(os.environ, LITELLM_LOCAL_MODEL_COST_MAP="True"):
        import litellm
    yield litellm
    asyncio.set_event_loop(None)
    loop.close()
