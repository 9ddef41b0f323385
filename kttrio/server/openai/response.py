"""How OpenAI clients are answered: chunks and whole objects made from deltas.

The streaming text path is kept short: one prepared event per choice, filled with the new text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kttrio.server import sse
from kttrio.server.completion import Usage
from kttrio.server.decoding import Answer, CallDelta, Delta
from kttrio.server.errors import ApiError, error_body
from kttrio.server.openai.logprobs import TextLogprobs, chat_logprobs
from kttrio.server.prompting import EchoedPrompt
from kttrio.text.tokenizer import Tokenizer

HOLE = "%text%"


@dataclass(frozen=True, slots=True)
class Head:
    """What every object and chunk of one answer repeats."""

    id: str
    created: int
    model: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What an answer tells beside the choices."""

    prompts: Sequence[EchoedPrompt]
    """Of each choice."""
    include_usage: bool = False
    usage: Callable[[], Usage] | None = None
    """As it is now; None: chunks do not tell it."""
    token_ids: bool = False

    @property
    def fast(self) -> bool:
        """Chunks with text differ in nothing else."""
        return self.usage is None


class Chunks:
    """The chunks of one answer, whatever their choices say, and its end."""

    def __init__(self, fields: dict[str, Any], stream: sse.EventStream, extras: Extras) -> None:
        self._fields = fields
        self._stream = stream
        self._extras = extras

    def chunk(self, entry: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._fields, "choices": [entry]}
        usage = self._extras.usage
        return {**chunk, "usage": usage_fields(usage())} if usage else chunk

    def end(self, error: ApiError | None, usage: Usage) -> None:
        """The last events. An answer that is incomplete never ends with [DONE]."""
        if error is not None:
            self._stream.put(sse.event(error_body(error)))
        else:
            if self._extras.include_usage:
                last = {**self._fields, "choices": [], "usage": usage_fields(usage)}
                self._stream.put(sse.event(last))
            self._stream.put(sse.DONE)
        self._stream.end()


class ChatStream:
    """Writes a chat completion as chunks: role, text, one end per choice, usage, [DONE]."""

    def __init__(
        self, head: Head, stream: sse.EventStream, tokenizer: Tokenizer, extras: Extras
    ) -> None:
        self._chunks = Chunks(head.fields("chat.completion.chunk"), stream, extras)
        self._stream = stream
        self._tokenizer = tokenizer
        self._extras = extras
        self._fast = extras.fast
        self._texts: dict[int, sse.EventTemplate] = {}

    def on_text(self, choice: int, text: str) -> None:
        if not self._fast:
            self.on_delta(choice, Delta(text))
            return
        template = self._texts.get(choice) or self._begin(choice)
        self._stream.put(template.fill(text))

    def on_delta(self, choice: int, delta: Delta) -> None:
        if choice not in self._texts:
            self._begin(choice)
        self._stream.put(b"".join(map(sse.event, self._chunks_of(choice, delta))))

    def _begin(self, choice: int) -> sse.EventTemplate:
        first = self._chunk(choice, {"role": "assistant", "content": ""})
        if self._extras.token_ids and not self._texts:
            first["prompt_token_ids"] = self._extras.prompts[choice].ids
        self._stream.put(sse.event(first))
        template = sse.EventTemplate(self._chunk(choice, {"content": HOLE}), HOLE)
        self._texts[choice] = template
        return template

    def _chunks_of(self, choice: int, delta: Delta) -> list[dict[str, Any]]:
        changes: list[dict[str, Any]] = []
        if delta.reasoning:
            changes.append({"reasoning_content": delta.reasoning})
        if delta.text:
            changes.append({"content": delta.text})
        changes += [{"tool_calls": [call_fields(call)]} for call in delta.calls]
        if delta.finish is not None or not changes:
            changes.append({})
        chunks = [self._chunk(choice, change) for change in changes]
        first, last = chunks[0]["choices"][0], chunks[-1]["choices"][0]
        if delta.logprobs:
            first["logprobs"] = chat_logprobs(self._tokenizer, delta.logprobs)
        if delta.token_ids:
            first["token_ids"] = delta.token_ids
        if delta.finish is not None:
            last["finish_reason"] = delta.finish
            last["matched_stop"] = delta.matched_stop
        return chunks

    def _chunk(self, choice: int, change: dict[str, Any]) -> dict[str, Any]:
        entry = {"index": choice, "delta": change, "logprobs": None, "finish_reason": None}
        return self._chunks.chunk(entry)

    def on_end(self, error: ApiError | None, usage: Usage) -> None:
        self._chunks.end(error, usage)


class TextStream:
    """Writes a text completion as chunks."""

    def __init__(
        self, head: Head, stream: sse.EventStream, tokenizer: Tokenizer, extras: Extras
    ) -> None:
        self._chunks = Chunks(head.fields("text_completion"), stream, extras)
        self._stream = stream
        self._extras = extras
        self._fast = extras.fast
        self._logprobs = [TextLogprobs(tokenizer, prompt.ids) for prompt in extras.prompts]
        self._texts: dict[int, sse.EventTemplate] = {}

    def on_text(self, choice: int, text: str) -> None:
        template = self._texts.get(choice)
        if template is None or not self._fast:
            self.on_delta(choice, Delta(text))
        else:
            self._stream.put(template.fill(text))

    def on_delta(self, choice: int, delta: Delta) -> None:
        prompt = self._extras.prompts[choice]
        is_first = choice not in self._texts
        if is_first:
            self._texts[choice] = sse.EventTemplate(self._chunk(choice, HOLE), HOLE)
        chunk = self._chunk(choice, prompt.echo + delta.text if is_first else delta.text)
        entry = chunk["choices"][0]
        if is_first and self._extras.token_ids:
            entry["prompt_token_ids"] = prompt.ids
        if delta.token_ids:
            entry["token_ids"] = delta.token_ids
        if delta.logprobs or delta.prompt_logprobs:
            logprobs = self._logprobs[choice]
            entry["logprobs"] = logprobs.fields(delta.prompt_logprobs, delta.logprobs)
        if delta.finish is not None:
            entry["finish_reason"] = delta.finish
            entry["matched_stop"] = delta.matched_stop
        self._stream.put(sse.event(chunk))

    def _chunk(self, choice: int, text: str) -> dict[str, Any]:
        entry = {"index": choice, "text": text, "logprobs": None, "finish_reason": None}
        return self._chunks.chunk(entry)

    def on_end(self, error: ApiError | None, usage: Usage) -> None:
        self._chunks.end(error, usage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """An answer that is told at once."""

    head: Head
    answers: Sequence[Answer]
    usage: Usage
    extras: Extras
    version: str
    """Of the weights."""

    def fields(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self.head.fields(kind),
            "choices": choices,
            "usage": usage_fields(self.usage),
            "metadata": {"weight_version": self.version},
        }


def chat_object(whole: Whole, tokenizer: Tokenizer) -> dict[str, Any]:
    """A whole chat completion."""
    tells_ids = whole.extras.token_ids
    choices = [
        _chat_choice(index, answer, tokenizer) | _answer_ids(answer, tells_ids)
        for index, answer in enumerate(whole.answers)
    ]
    told = whole.fields("chat.completion", choices)
    return {**told, "prompt_token_ids": whole.extras.prompts[0].ids} if tells_ids else told


def _answer_ids(answer: Answer, tells_ids: bool) -> dict[str, Any]:
    return {"token_ids": answer.token_ids} if tells_ids else {}


def _chat_choice(index: int, answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in answer.calls
    ]
    message = {
        "role": "assistant",
        "content": None if calls and not answer.text else answer.text,
        "refusal": None,
        "reasoning_content": answer.reasoning or None,
        "tool_calls": calls or None,
    }
    logprobs = chat_logprobs(tokenizer, answer.logprobs) if answer.logprobs else None
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": answer.finish,
        "matched_stop": answer.matched_stop,
    }


def text_object(whole: Whole, tokenizer: Tokenizer) -> dict[str, Any]:
    """A whole text completion."""
    choices = []
    for index, answer in enumerate(whole.answers):
        prompt = whole.extras.prompts[index]
        choice = {
            "index": index,
            "text": prompt.echo + answer.text,
            "logprobs": _text_scores(answer, prompt, tokenizer),
            "finish_reason": answer.finish,
            "matched_stop": answer.matched_stop,
        }
        if whole.extras.token_ids:
            choice |= {"prompt_token_ids": prompt.ids, "token_ids": answer.token_ids}
        choices.append(choice)
    return whole.fields("text_completion", choices)


def _text_scores(
    answer: Answer, prompt: EchoedPrompt, tokenizer: Tokenizer
) -> dict[str, Any] | None:
    if not (answer.logprobs or answer.prompt_logprobs):
        return None
    scores = TextLogprobs(tokenizer, prompt.ids)
    return scores.fields(answer.prompt_logprobs, answer.logprobs)


def usage_fields(usage: Usage) -> dict[str, Any]:
    details = {"reasoning_tokens": usage.reasoning_tokens}
    if usage.drafts is not None:
        details["accepted_prediction_tokens"] = usage.drafts.accepted
        details["rejected_prediction_tokens"] = usage.drafts.rejected
    return {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},  # no request sees another's prompt
        "completion_tokens_details": details,
        "reasoning_tokens": usage.reasoning_tokens,
    }


def call_fields(call: CallDelta) -> dict[str, Any]:
    """One piece of a tool call; only the first carries id and name."""
    if call.name is None:
        return {"index": call.number, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.number, "id": call.id, "type": "function", "function": function}
