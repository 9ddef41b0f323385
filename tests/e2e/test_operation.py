"""Starting, draining, ending: the server as the person sees it who runs it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import ROOT, Server, running_server
from tools.bench.measure import in_use

NUM_VANISHING = 200


def get(server: Server, path: str) -> dict:
    with urllib.request.urlopen(server.url + path, timeout=30) as answer:
        return json.load(answer)


def long_stream(client: openai.OpenAI, num_tokens: int) -> openai.Stream:
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "Hello!"}],
        max_tokens=num_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )


def kttrio(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kttrio", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_it_says_what_it_decided(server: Server) -> None:
    for word in ("model", "kernels", "threads", "KV cache", "weights"):
        assert word in server.output, server.output


def test_health_and_info(server: Server) -> None:
    assert get(server, "/health")["status"] == "ok"
    assert get(server, "/get_server_info")


def test_clients_that_vanish_leave_nothing_behind(server: Server, model: str) -> None:
    """Each asks for a long stream, reads its first bytes and drops the connection."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
    }
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    host, port = server.url.removeprefix("http://").split(":")

    def vanish(_index: int) -> bytes:
        with socket.create_connection((host, int(port)), timeout=120) as connection:
            connection.sendall(head.encode() + payload)
            return connection.recv(64)

    with ThreadPoolExecutor(32) as clients:
        starts = list(clients.map(vanish, range(NUM_VANISHING)))
    assert {start.split()[1] for start in starts} == {b"200"}
    deadline = time.monotonic() + 60
    while (left := used(server)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def used(server: Server) -> list[str]:
    counts = in_use(get(server, "/get_server_info"))
    return [f"{count} {name}" for name, count in counts.items() if count]


def test_sigterm_lets_running_streams_finish() -> None:
    with running_server() as server, server.client() as client:
        chunks = iter(long_stream(client, 100))
        next(chunks)
        server.process.send_signal(signal.SIGTERM)
        rest = list(chunks)
        assert rest[-1].choices[0].finish_reason == "length"
        assert server.process.wait(60) == 0


def test_the_drain_limit_ends_streams_with_an_error_event() -> None:
    with running_server("--drain-seconds", "0.2") as server, server.client() as client:
        chunks = iter(long_stream(client, 1500))
        next(chunks)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)
        assert server.process.wait(60) == 0


def test_a_second_signal_ends_at_once() -> None:
    with running_server("--drain-seconds", "600") as server, server.client() as client:
        chunks = iter(long_stream(client, 1500))
        next(chunks)
        server.process.send_signal(signal.SIGINT)
        server.wait_for("stopping")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 1
        with pytest.raises(Exception, match=r"incomplete|closed|Connection"):
            list(chunks)


@pytest.mark.parametrize("after", [0.0, 0.1])
def test_an_interrupt_ends_a_server_that_still_loads(after: float) -> None:
    """It has just said how the memory is divided."""
    command = [sys.executable, "-m", "kttrio", "serve", "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("memory") for line in process.stdout)
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130


def test_a_taken_port_is_refused_before_the_model_is_loaded(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    found = kttrio("serve", "--port", port)
    assert found.returncode == 2
    assert f"--port {port}" in found.stderr
    assert "KV cache" not in found.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "no/such/place"], "--model: no/such/place is no directory"),
        (["--modle", "x"], "unknown flag --modle; did you mean --model?"),
        (["--kt-numa-nodes", "999"], "NUMA node 999"),
    ],
)
def test_bad_settings_end_with_code_2(flags: list[str], message: str) -> None:
    found = kttrio("serve", *flags)
    assert found.returncode == 2
    assert message in found.stderr


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    found = kttrio("serve", "--model", str(tmp_path))
    assert found.returncode == 2
    assert "config.json" in found.stderr


def test_version_names_the_library_and_its_kernels() -> None:
    found = kttrio("version")
    assert found.returncode == 0
    for word in ("kttrio", "torch", "trio", "ABI", "avx2"):
        assert word in found.stdout


def test_chat_works_from_a_pipe(server: Server) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "kttrio", "chat", "--url", server.url, "--temperature", "0"],
        cwd=ROOT,
        input="What is kttrio?\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert "experts" in found.stdout
    assert "tokens/s" in found.stderr
