"""What the front costs: CPU seconds of the event loop's thread per token and stream.

Run as `python -m tests.server.pace [streams] [step_ms] [seconds]`. The clients live in a process of
their own and the runner in its thread, so the event loop's thread pays for all that the front does:
commit and plan, decoding, framing, sends.
"""

from __future__ import annotations

import resource
import selectors
import socket
import sys
import time
from dataclasses import dataclass
from functools import partial

import trio

from tests.http_front import chat_body, raw_request, running_front


@dataclass(frozen=True)
class Pace:
    num_streams: int
    tokens: int
    user_seconds: float
    system_seconds: float
    wall_seconds: float
    steps: int

    @property
    def cpu_us_per_token(self) -> float:
        return (self.user_seconds + self.system_seconds) / self.tokens * 1e6


async def measure(num_streams: int, *, step_seconds: float, seconds: float) -> Pace:
    """Let `num_streams` streams run, and measure in their midst."""
    async with running_front(
        num_slots=num_streams, delay=step_seconds, context_length=8192
    ) as front:
        front.script.endless = True
        command = [sys.executable, "-m", "tests.server.pace", "--clients", str(front.port)]
        async with trio.open_nursery() as nursery:
            arguments = [*command, str(num_streams)]
            process = await nursery.start(partial(trio.run_process, arguments, check=False))
            stats = front.state.engine
            while stats.stats.running < num_streams:
                await trio.lowlevel.checkpoint()
            await trio.sleep(10 * step_seconds)
            before, cpu, wall = stats.stats, cpu_times(), time.perf_counter()
            await trio.sleep(seconds)
            after = stats.stats
            user, system = (now - then for now, then in zip(cpu_times(), cpu, strict=True))
            wall = time.perf_counter() - wall
            process.kill()
        await front.idle()
    tokens = after.generated_tokens - before.generated_tokens
    return Pace(num_streams, tokens, user, system, wall, after.steps - before.steps)


def cpu_times() -> tuple[float, float]:
    """CPU seconds of this thread: its own code, and the kernel for it."""
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return usage.ru_utime, usage.ru_stime


def drain(port: int, num_streams: int) -> None:
    """The clients: read and forget, until killed."""
    selector = selectors.DefaultSelector()
    for _ in range(num_streams):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(raw_request(chat_body(stream=True)))
        selector.register(client, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            key.fileobj.recv(1 << 16)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--clients"]:
        drain(int(sys.argv[2]), int(sys.argv[3]))
    numbers = [float(text) for text in sys.argv[1:]]
    streams, step_ms, duration = [*numbers, *(64, 20, 5)[len(numbers) :]]
    pace = trio.run(lambda: measure(int(streams), step_seconds=step_ms / 1000, seconds=duration))
    print(f"{pace.num_streams} streams, {pace.steps} steps in {pace.wall_seconds:.2f} s")
    system = pace.system_seconds / pace.tokens * 1e6
    print(
        f"{pace.tokens} tokens: {pace.cpu_us_per_token:.2f} us of CPU per token and stream, "
        f"of which {system:.2f} us in the kernel"
    )
