"""Streams that are read and forgotten, in a process of its own that costs next to nothing, so that
what is measured is the server. Prints how many streams did not end as they should, and when
something came (seconds of the system's monotonic clock).

    python -m tools.bench.readers URL STREAMS MAX_TOKENS PROMPT_TOKENS TOP_P
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from urllib.parse import urlsplit

END = b"data: [DONE]\n\n"


def main(url: str, num_streams: int, max_tokens: int, prompt_tokens: int, top_p: float) -> None:
    """Open all streams, read each to its end."""
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or 80)
    body = {
        "prompt": list(range(300, 300 + prompt_tokens)),
        "max_tokens": max_tokens,
        "temperature": 1.0,
        "top_p": top_p,
        "ignore_eos": True,
        "stream": True,
    }
    selector = selectors.DefaultSelector()
    for seed in range(num_streams):
        client = socket.create_connection(address)
        client.sendall(request(json.dumps({**body, "seed": seed}).encode()))
        selector.register(client, selectors.EVENT_READ)
    arrivals: list[float] = []
    failed = num_streams - sum(ends(selector, num_streams, arrivals))
    print(json.dumps({"failed": failed, "arrivals": arrivals}))


def request(body: bytes) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def ends(selector: selectors.BaseSelector, num_open: int, arrivals: list[float]) -> list[bool]:
    """One entry for each stream: whether it came to its proper end."""
    found: list[bool] = []
    while len(found) < num_open:
        for key, _ in selector.select():
            client = key.fileobj
            assert isinstance(client, socket.socket)
            data = client.recv(1 << 16)
            arrivals.append(time.monotonic())
            if not data or END in data:
                found.append(bool(data))
                selector.unregister(client)
    return found


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5]))
