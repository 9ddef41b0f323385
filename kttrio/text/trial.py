"""Compiles grammars in a process that may die of them: some need more stack, memory or time than
there is, and nothing in their text tells which. What passes here is safe to compile at home.

The process runs this file as a script, so it imports nothing of this package.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from threading import Lock, Thread, stack_size

SECONDS = 3.0
"""For one grammar. Those of real requests take milliseconds."""
STARTING_SECONDS = 30.0
MEMORY_BYTES = 2 << 30
STACK_BYTES = 2 << 20
"""Threads at home have four times as much."""


class Trial:
    """The process, started when it is first needed. Threads take turns."""

    def __init__(
        self, limits: Mapping[str, int], special_tokens: Mapping[str, int], vocab_size: int
    ) -> None:
        """`limits`: arguments of llguidance's LLParserLimits. The others: what a grammar may name,
        by its text."""
        self._settings = json.dumps([dict(limits), dict(special_tokens), vocab_size])
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stop: Callable[[], object] = lambda: None

    def complaint(self, grammar: str) -> str:
        """What is wrong with the grammar, in llguidance's words or ours; empty if nothing is."""
        with self._lock:
            process = self._process = self._process or self._start()
            answer = _ask(process, grammar, SECONDS)
            if answer is None:
                self._process = None
                self._stop()
                return f"too large or too deep, or it takes more than {SECONDS:g} s to compile"
            return answer

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            start_new_session=True,  # Ctrl-C is for the server
        )
        self._stop = weakref.finalize(self, _stop, process)
        _ask(process, self._settings, STARTING_SECONDS)
        return process


def _ask(process: subprocess.Popen[str], question: str, seconds: float) -> str | None:
    """The answer; None where none comes in time, or the process has died."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
    except OSError:
        return None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline() if selector.select(seconds) else ""
    return str(json.loads(line)) if line.endswith("\n") else None


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


class _Bytes:
    """A vocabulary of single bytes behind the tokens that a grammar may name."""

    def __init__(self, special_tokens: Mapping[str, int], vocab_size: int) -> None:
        self.tokens = [b""] * vocab_size
        for token, id in special_tokens.items():
            self.tokens[id] = token.encode()
        self.tokens += [bytes([byte]) for byte in range(256)]
        self.tokens.append(b"<end>")
        self.special_token_ids = [*special_tokens.values(), len(self.tokens) - 1]
        self.bos_token_id = None
        self.eos_token_id = len(self.tokens) - 1
        self._first = vocab_size

    def __call__(self, raw: bytes) -> list[int]:
        return [self._first + byte for byte in raw]


def _serve() -> None:
    """Answer question by question, until the server is gone."""
    import resource

    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    limits, special_tokens, vocab_size = json.loads(json.loads(sys.stdin.readline()))
    limits = LLParserLimits(**limits)
    words = LLTokenizer(TokenizerWrapper(_Bytes(special_tokens, vocab_size)))
    _say("")
    for line in sys.stdin:
        matcher = LLMatcher(words, json.loads(line), log_level=0, limits=limits)
        matcher.compute_bitmask()
        _say(matcher.get_error())


def _say(answer: str) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    stack_size(STACK_BYTES)
    thread = Thread(target=_serve)
    thread.start()
    thread.join()
