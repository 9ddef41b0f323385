"""`kttrio chat`: a conversation in the terminal, over HTTP, with any OpenAI-compatible server.

The loop that reads lines is plain Python in the main thread, so that line editing and Ctrl-C work
as everywhere; each answer is one `trio.run`. Without a terminal every line of stdin is a question.
"""

from __future__ import annotations

import signal
import sys
import time
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import trio
from rich.console import Console

from kttrio.cli.flags import parse_flags
from kttrio.client import Client, ClientError
from kttrio.config import flag

HELP = """\
/help    this list
/clear   forget the conversation
/retry   ask the last question again
/quit    leave (also Ctrl-D)
Ctrl-C ends an answer; once more leaves."""


@dataclass(frozen=True, slots=True)
class ChatConfig:
    """Where to talk to, and how."""

    url: str = flag("http://127.0.0.1:30000", "address of the server")
    api_key: str | None = flag(None, "bearer token the server asks for")
    model: str | None = flag(None, "model name; default: the first one the server lists")
    system: str | None = flag(None, "system prompt of the conversation")
    temperature: float | None = flag(None, "0 is greedy; default: the server's", least=0, most=2)
    max_tokens: int | None = flag(None, "longest answer; default: the server's", least=1)
    timeout: float = flag(300.0, "give up after so many silent seconds", least=0.1)


@dataclass(slots=True)
class Answer:
    """What has been received of one answer."""

    text: str = ""
    tool_calls: str = ""
    num_tokens: int = 0
    started: float = 0.0
    first: float | None = None
    ended: float = 0.0
    interrupted: bool = False
    error: str = ""

    def speed(self) -> str:
        """Tokens per second after the first one, and the wait for that."""
        if self.first is None:
            return "no answer"
        wait = f"first after {self.first - self.started:.2f} s"
        seconds = self.ended - self.first
        if self.num_tokens < 2 or seconds <= 0:
            return f"{self.num_tokens} tokens, {wait}"
        return f"{self.num_tokens} tokens, {(self.num_tokens - 1) / seconds:.1f} tokens/s, {wait}"


def run(argv: Sequence[str]) -> int:
    (config,) = parse_flags(
        "kttrio chat", "Talk to an OpenAI-compatible server.", argv, [ChatConfig]
    )
    with suppress(ImportError):
        import_module("readline")  # its import alone gives input() line editing and history
    chat = Chat(config, Console(soft_wrap=True, highlight=False))
    try:
        chat.connect()
        return chat.loop(interactive=sys.stdin.isatty())
    except ClientError as error:
        print(f"kttrio chat: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # while it waited for the server's first word


class Chat:
    """One conversation: its messages, and the terminal it is held in."""

    def __init__(self, config: ChatConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self._model = config.model or ""
        self._messages: list[dict[str, str]] = []
        self._interrupts = 0
        self._failures = 0
        self._clear()

    def connect(self) -> None:
        """Find out the model's name; ClientError when nobody answers."""
        if not self._model:
            self._model = trio.run(self._first_model)
        self._dim(f"{self._model} at {self._config.url}; /help lists the commands")

    def loop(self, *, interactive: bool) -> int:
        """Ask for lines until the end; 1 when stdin is piped and an answer failed."""
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                return 1 if self._failures and not interactive else 0
            except KeyboardInterrupt:
                self._console.print()
                if self._interrupts:
                    return 130
                self._interrupts = 1
                self._dim("Ctrl-C once more, or /quit, to leave")
                continue
            if line == "/quit":
                return 0
            if line:
                self._interrupts = 0
                self._handle(line)

    def _handle(self, line: str) -> None:
        if line == "/help":
            self._dim(HELP)
        elif line == "/clear":
            self._clear()
            self._dim("the conversation is forgotten")
        elif line == "/retry":
            self._retry()
        elif line.startswith("/"):
            self._dim(f"no command {line.split()[0]}; /help lists them")
        else:
            self._messages.append({"role": "user", "content": line})
            self._ask()

    def _clear(self) -> None:
        system = self._config.system
        self._messages = [{"role": "system", "content": system}] if system else []

    def _retry(self) -> None:
        while self._messages and self._messages[-1]["role"] == "assistant":
            self._messages.pop()
        if self._messages and self._messages[-1]["role"] == "user":
            self._ask()
        else:
            self._dim("there is no question to ask again")

    def _ask(self) -> None:
        """Stream one answer; a failed one leaves the question, so that /retry can repeat it."""
        answer = Answer()
        trio.run(self._stream, answer)
        self._console.print()
        if answer.error:
            self._failures += 1
            self._console.print(f"error: {answer.error}", style="red", markup=False)
            return
        self._interrupts = int(answer.interrupted)
        text = answer.text or answer.tool_calls
        if text:
            self._messages.append({"role": "assistant", "content": text})
        self._dim(("interrupted; " if answer.interrupted else "") + answer.speed())

    async def _first_model(self) -> str:
        async with self._client() as client:
            listed = await client.get_json("/v1/models")
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ClientError("the server lists no model; name one with --model") from None

    def _client(self) -> Client:
        config = self._config
        return Client(config.url, api_key=config.api_key, timeout=config.timeout)

    async def _stream(self, answer: Answer) -> None:
        with trio.open_signal_receiver(signal.SIGINT) as interrupts:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(_cancel_on, interrupts, answer, nursery.cancel_scope))
                try:
                    await self._receive(answer)
                except ClientError as error:
                    answer.error = str(error)
                finally:
                    answer.ended = time.perf_counter()
                    nursery.cancel_scope.cancel()

    async def _receive(self, answer: Answer) -> None:
        answer.started = time.perf_counter()
        async with (
            self._client() as client,
            client.stream("/v1/chat/completions", self._body()) as events,
        ):
            while (chunk := await events.chunk()) is not None:
                self._show(chunk, answer)

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "messages": self._messages, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self._config.temperature is not None:
            body["temperature"] = self._config.temperature
        if self._config.max_tokens is not None:
            body["max_tokens"] = self._config.max_tokens
        return body

    def _show(self, chunk: dict[str, Any], answer: Answer) -> None:
        usage = chunk.get("usage")
        if usage:
            answer.num_tokens = usage.get("completion_tokens", answer.num_tokens)
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            reasoning = delta.get("reasoning_content") or delta.get("reasoning")
            text = delta.get("content")
            calls = _call_text(delta.get("tool_calls") or ())
            if not (reasoning or text or calls):
                continue
            if answer.first is None:
                answer.first = time.perf_counter()
            answer.num_tokens += not usage
            answer.text += text or ""
            answer.tool_calls += calls
            self._write(reasoning or "", "dim")
            self._write(text or "", "")
            self._write(calls, "cyan")

    def _write(self, text: str, style: str) -> None:
        if style and text:
            self._console.out(_printable(text), style=style, end="")
        elif text:
            self._console.file.write(_printable(text))  # rich would expand tabs
            self._console.file.flush()

    def _dim(self, text: str) -> None:
        if self._console.is_terminal:
            self._console.print(text, style="dim", markup=False)
        else:
            print(text, file=sys.stderr)


async def _cancel_on(interrupts: Any, answer: Answer, scope: trio.CancelScope) -> None:
    async for _ in interrupts:
        answer.interrupted = True
        scope.cancel()


def _call_text(calls: Sequence[dict[str, Any]]) -> str:
    """A tool call's name and arguments as they arrive in pieces."""
    parts = []
    for call in calls:
        function = call.get("function") or {}
        if function.get("name"):
            parts.append(f"\n[call {function['name']}] ")
        parts.append(function.get("arguments") or "")
    return "".join(parts)


def _printable(text: str) -> str:
    """Without control characters: an answer must not steer the terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")
