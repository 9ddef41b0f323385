"""What a plain server pays for the same streams: asyncio, a queue and a task for each stream, one
JSON object and one `drain` for each token. Also what the kernel takes for the writes alone.

    python -m tools.bench.plain STYLE STREAMS MAX_TOKENS STEP_SECONDS

STYLE is `queues` or `writes`. Prints CPU microseconds per token and stream, and the kernel's share.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time

from tools.bench.readers import END

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PIECES = (" the", " of", "ing", " weather", ".", " Paris", "\n", " is")


def chunk(text: str, finish: str | None = None) -> bytes:
    """A token as OpenAI's clients get it, framed for HTTP/1.1."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    head = {"id": f"cmpl-{0:032x}", "object": "text_completion", "created": 1, "model": "plain"}
    event = b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"
    return framed(event)


def framed(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


class Queues:
    """A queue for each stream: the step puts a token in, the stream's task takes it out."""

    def __init__(self, arrived: asyncio.Semaphore) -> None:
        self._arrived = arrived
        self.streams: list[asyncio.Queue[str | None]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD)
        tokens: asyncio.Queue[str | None] = asyncio.Queue()
        self.streams.append(tokens)
        self._arrived.release()
        while (text := await tokens.get()) is not None:
            writer.write(chunk(text))
            await writer.drain()
        writer.write(framed(END) + b"0\r\n\r\n")
        writer.close()

    def step(self, number: int) -> None:
        for place, tokens in enumerate(self.streams):
            tokens.put_nowait(PIECES[(number + place) % len(PIECES)])

    def end(self) -> None:
        for tokens in self.streams:
            tokens.put_nowait(None)


class Writes:
    """Nothing but one write of a prepared chunk for each stream: what no server can do without."""

    def __init__(self, arrived: asyncio.Semaphore) -> None:
        self._arrived = arrived
        self.streams: list[asyncio.StreamWriter] = []
        self._chunk = chunk(" weather")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD)
        self.streams.append(writer)
        self._arrived.release()

    def step(self, number: int) -> None:
        for writer in self.streams:
            writer.write(self._chunk)

    def end(self) -> None:
        for writer in self.streams:
            writer.write(framed(END) + b"0\r\n\r\n")
            writer.close()


STYLES: dict[str, type[Queues | Writes]] = {"queues": Queues, "writes": Writes}


async def measure(style: str, num_streams: int, num_tokens: int, seconds: float) -> list[float]:
    """CPU seconds per token and stream, and the kernel's share, over all but the first steps."""
    arrived = asyncio.Semaphore(0)
    streams = STYLES[style](arrived)
    server = await asyncio.start_server(streams.serve, "127.0.0.1", 0, backlog=num_streams)
    port = server.sockets[0].getsockname()[1]
    arguments = [f"http://127.0.0.1:{port}", str(num_streams), str(num_tokens), "16", "0.9"]
    readers = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tools.bench.readers", *arguments),
        stdout=asyncio.subprocess.DEVNULL,
    )
    for _ in range(num_streams):
        await arrived.acquire()
    begin = resource.getrusage(resource.RUSAGE_SELF)
    for number in range(num_tokens):
        due = time.perf_counter() + seconds
        streams.step(number)
        await asyncio.sleep(max(due - time.perf_counter(), 0))
    end = resource.getrusage(resource.RUSAGE_SELF)
    streams.end()
    await readers.wait()
    server.close()
    user, kernel = end.ru_utime - begin.ru_utime, end.ru_stime - begin.ru_stime
    return [(user + kernel) / num_tokens / num_streams, kernel / num_tokens / num_streams]


if __name__ == "__main__":
    numbers = asyncio.run(measure(sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4])))
    print(json.dumps(numbers))
