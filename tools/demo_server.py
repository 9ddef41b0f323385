"""A real server on the demo model, for as long as a bench or a fuzzer needs one."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from kttrio.client import ClientError

ROOT = Path(__file__).parents[1]
START_SECONDS = 180.0
POLL_SECONDS = 0.2
URL = re.compile(r"listening on (http://\S+)")
FAULT = re.compile(r"\bERROR\b|Traceback")
GRPC = re.compile(r"^grpc +(\S+)$", re.M)


@dataclass(frozen=True, slots=True)
class Server:
    """Where it listens, and as whom it runs."""

    pid: int
    url: str
    grpc: str
    """HOST:PORT."""

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def grpc_port(self) -> int:
        return int(self.grpc.rsplit(":", 1)[1])


@asynccontextmanager
async def running_server(log: Path, *flags: str) -> AsyncIterator[Server]:
    """Serve for as long as the block lasts; what it prints goes to `log`. Raises ClientError where
    it does not start, or does not end well."""
    ports = ("--port", "0", "--grpc-port", "0")
    command = [sys.executable, "-m", "kttrio", "serve", *ports, *flags]
    with log.open("w") as output:
        process = await trio.lowlevel.open_process(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield await _listening(process, log)
        process.terminate()
        if await process.wait():
            raise ClientError(f"the server ended with {process.returncode}; see {log}")
    finally:
        if process.returncode is None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def _listening(process: trio.Process, log: Path) -> Server:
    with trio.move_on_after(START_SECONDS):
        while process.poll() is None:
            if (found := _find(log, process.pid)) is not None:
                return found
            await trio.sleep(POLL_SECONDS)
    raise ClientError(f"the server does not start; see {log}")


def _find(log: Path, pid: int) -> Server | None:
    told = log.read_text()
    url, grpc = URL.search(told), GRPC.search(told)
    return Server(pid, url[1], grpc[1]) if url and grpc else None


def faults(log: Path) -> list[str]:
    """What a server has told of its own failures."""
    return [line for line in log.read_text().splitlines() if FAULT.search(line)]
