"""Asks /health over and over, in a process of its own, so that a busy bench does not count as a
slow server. Ends with its stdin and prints what it found as JSON.

    python -m tools.bench.health URL
"""

from __future__ import annotations

import json
import select
import sys
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

INTERVAL = 0.05
TIMEOUT = 30.0


def main(url: str) -> None:
    """One request at a time over a kept connection, until stdin ends."""
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT)
    seconds, errors = [], 0
    while not select.select([sys.stdin], [], [], INTERVAL)[0]:
        started = time.perf_counter()
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            errors += answer.status != 200
            seconds.append(time.perf_counter() - started)
        except (OSError, HTTPException):
            connection.close()
            errors += 1
    print(json.dumps({"seconds": seconds, "errors": errors}))


if __name__ == "__main__":
    main(sys.argv[1])
