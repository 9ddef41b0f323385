"""The terminal chat against a scripted OpenAI server, its questions piped in."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kttrio.cli import chat as chat_module
from kttrio.cli.chat import Answer, Chat, run

PRESS_CTRL_C = {"content": "(ctrl-c)"}


class Script:
    """What the server hears and says: one list of deltas per question."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.headers: list[str | None] = []
        self.answers: list[list[dict] | int] = []
        self.url = ""
        self.hung_up = False


@pytest.fixture
def script() -> Iterator[Script]:
    state = Script()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.requests.append(json.loads(body))
            state.headers.append(self.headers["Authorization"])
            deltas = state.answers.pop(0)
            if isinstance(deltas, int):
                self._send(deltas, {"error": {"message": "too busy"}})
                return
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            for delta in deltas:
                if delta == PRESS_CTRL_C:
                    os.kill(os.getpid(), signal.SIGINT)
                    state.hung_up = self.rfile.read(1) == b""
                    return
                self._event({"choices": [{"delta": delta}]})
            self._event({"choices": [], "usage": {"completion_tokens": 7}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, chunk: dict) -> None:
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

        def _send(self, status: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield state
        server.shutdown()
        thread.join()


def talk(script: Script, monkeypatch: pytest.MonkeyPatch, lines: str, *flags: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return run(["--url", script.url, *flags])


def test_each_line_is_a_question_and_the_conversation_grows(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script.answers = [[{"role": "assistant"}, {"content": "Hel"}, {"content": "lo"}], [{}]]
    flags = ["--system", "be kind", "--temperature", "0", "--max-tokens", "9", "--api-key", "k"]
    assert talk(script, monkeypatch, "hi\n\nand you?\n", *flags) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "Hello"
    assert "tiny at http" in err
    assert "7 tokens" in err
    first, second = script.requests
    assert first["model"] == "tiny"
    assert (first["temperature"], first["max_tokens"]) == (0, 9)
    assert first["stream_options"] == {"include_usage": True}
    assert first["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
    ]
    assert second["messages"][2:] == [
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "and you?"},
    ]
    assert script.headers == ["Bearer k", "Bearer k"]


def test_retry_asks_again_and_clear_forgets(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script.answers = [[{"content": "one"}], [{"content": "two"}], [{"content": "three"}]]
    lines = "/retry\nhi\n/retry\n/clear\n/retry\nho\n/nonsense\n/help\n/quit\nnever\n"
    assert talk(script, monkeypatch, lines, "--model", "m") == 0
    assert [request["messages"] for request in script.requests] == [
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": "ho"}],
    ]
    out, err = capsys.readouterr()
    assert out.splitlines() == ["one", "two", "three"]
    assert err.count("no question to ask again") == 2
    assert "no command /nonsense" in err
    assert "/retry   ask the last question again" in err


def test_a_failed_answer_can_be_retried_and_is_the_exit_code_of_a_pipe(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script.answers = [503, [{"content": "better"}]]
    assert talk(script, monkeypatch, "hi\n/retry\n") == 1
    out = capsys.readouterr().out
    assert "error: the server answered 503: too busy" in out
    assert "better" in out


def test_reasoning_and_tool_calls_are_shown_and_control_characters_are_not(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"index": 0, "id": "c", "function": {"name": "get_weather", "arguments": '{"city": '}}
    rest = {"index": 0, "function": {"arguments": '"Oslo"}'}}
    script.answers = [
        [
            {"reasoning_content": "let me see "},
            {"content": "a\x1b[31mb\rc\té "},
            {"tool_calls": [call]},
            {"tool_calls": [rest]},
        ]
    ]
    assert talk(script, monkeypatch, "hi\n") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "let me see a[31mbc\té "
    assert lines[1] == '[call get_weather] {"city": "Oslo"}'


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--url", "http://127.0.0.1:1"]) == 1
    assert "cannot connect to 127.0.0.1:1" in capsys.readouterr().err


def test_ctrl_c_while_nobody_answers_leaves_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def pressed(_chat: Chat) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "_first_model", pressed)
    assert run([]) == 130
    assert capsys.readouterr().err == ""


def test_ctrl_c_warns_once_and_then_leaves(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    presses = []

    def pressed(_prompt: str) -> str:
        presses.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", pressed)
    assert run(["--url", script.url, "--model", "m"]) == 130
    assert len(presses) == 2
    assert "Ctrl-C once more, or /quit" in capsys.readouterr().err


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script.answers = [[{"content": "once upon "}, PRESS_CTRL_C], [{"content": "a time"}]]
    assert talk(script, monkeypatch, "tell\ngo on\n") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["once upon ", "a time"]
    assert "interrupted; " in err
    assert script.hung_up
    said = {"role": "assistant", "content": "once upon "}
    assert script.requests[1]["messages"][1] == said


def test_speed_counts_tokens_after_the_first() -> None:
    answer = Answer(num_tokens=11, started=1.0, first=2.0, ended=4.0)
    assert answer.speed() == "11 tokens, 5.0 tokens/s, first after 1.00 s"
    assert Answer(num_tokens=1, started=1.0, first=1.5, ended=1.5).speed() == (
        "1 tokens, first after 0.50 s"
    )
    assert Answer().speed() == "no answer"


def test_help_names_every_command() -> None:
    for command in ("/help", "/clear", "/retry", "/quit"):
        assert command in chat_module.HELP
