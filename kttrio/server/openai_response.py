"""How OpenAI clients are answered: chunks and whole objects made from deltas.

The streaming text path is kept short: one prepared event per choice, filled with the new text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kttrio.request import TokenLogprob
from kttrio.server import sse
from kttrio.server.completion import Usage
from kttrio.server.decoding import Answer, CallDelta, Delta, PromptLogprobs
from kttrio.server.errors import ApiError, error_body
from kttrio.server.prompting import EchoedPrompt
from kttrio.text.detokenizer import open_detokenizer
from kttrio.text.tokenizer import Tokenizer

HOLE = "%text%"
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


@dataclass(frozen=True, slots=True)
class Head:
    """What every object and chunk of one answer repeats."""

    id: str
    created: int
    model: str

    def fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ChatStream:
    """Writes a chat completion as chunks: role, text, one end per choice, usage, [DONE]."""

    def __init__(
        self, head: Head, stream: sse.EventStream, tokenizer: Tokenizer, *, include_usage: bool
    ) -> None:
        self._fields = head.fields("chat.completion.chunk")
        self._stream = stream
        self._tokenizer = tokenizer
        self._include_usage = include_usage
        self._texts: dict[int, sse.EventTemplate] = {}

    def on_text(self, choice: int, text: str) -> None:
        template = self._texts.get(choice) or self._begin(choice)
        self._stream.put(template.fill(text))

    def on_delta(self, choice: int, delta: Delta) -> None:
        if choice not in self._texts:
            self._begin(choice)
        self._stream.put(b"".join(map(sse.event, self._chunks(choice, delta))))

    def _begin(self, choice: int) -> sse.EventTemplate:
        self._stream.put(sse.event(self._chunk(choice, {"role": "assistant", "content": ""})))
        template = sse.EventTemplate(self._chunk(choice, {"content": HOLE}), HOLE)
        self._texts[choice] = template
        return template

    def _chunks(self, choice: int, delta: Delta) -> list[dict[str, Any]]:
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
        if delta.finish is not None:
            last["finish_reason"] = delta.finish
            last["matched_stop"] = delta.matched_stop
        return chunks

    def _chunk(self, choice: int, change: dict[str, Any]) -> dict[str, Any]:
        entry = {"index": choice, "delta": change, "logprobs": None, "finish_reason": None}
        return {**self._fields, "choices": [entry]}

    def on_end(self, error: ApiError | None, usage: Usage) -> None:
        end_stream(self._stream, self._fields, error, usage if self._include_usage else None)


class TextStream:
    """Writes a text completion as chunks. `prompts`: of each choice."""

    def __init__(
        self,
        head: Head,
        stream: sse.EventStream,
        tokenizer: Tokenizer,
        *,
        include_usage: bool,
        prompts: Sequence[EchoedPrompt],
    ) -> None:
        self._fields = head.fields("text_completion")
        self._stream = stream
        self._include_usage = include_usage
        self._prompts = prompts
        self._logprobs = [TextLogprobs(tokenizer, prompt.ids) for prompt in prompts]
        self._texts: dict[int, sse.EventTemplate] = {}

    def on_text(self, choice: int, text: str) -> None:
        template = self._texts.get(choice)
        if template is None:
            self.on_delta(choice, Delta(text))
        else:
            self._stream.put(template.fill(text))

    def on_delta(self, choice: int, delta: Delta) -> None:
        text = delta.text
        if choice not in self._texts:
            self._texts[choice] = sse.EventTemplate(self._chunk(choice, HOLE), HOLE)
            text = self._prompts[choice].echo + text
        chunk = self._chunk(choice, text)
        entry = chunk["choices"][0]
        if delta.logprobs or delta.prompt_logprobs:
            logprobs = self._logprobs[choice]
            entry["logprobs"] = logprobs.fields(delta.prompt_logprobs, delta.logprobs)
        if delta.finish is not None:
            entry["finish_reason"] = delta.finish
            entry["matched_stop"] = delta.matched_stop
        self._stream.put(sse.event(chunk))

    def _chunk(self, choice: int, text: str) -> dict[str, Any]:
        entry = {"index": choice, "text": text, "logprobs": None, "finish_reason": None}
        return {**self._fields, "choices": [entry]}

    def on_end(self, error: ApiError | None, usage: Usage) -> None:
        end_stream(self._stream, self._fields, error, usage if self._include_usage else None)


def end_stream(
    stream: sse.EventStream, fields: dict[str, Any], error: ApiError | None, usage: Usage | None
) -> None:
    """The last events. An answer that is incomplete never ends with [DONE]."""
    if error is not None:
        stream.put(sse.event(error_body(error)))
    else:
        if usage is not None:
            stream.put(sse.event({**fields, "choices": [], "usage": usage_fields(usage)}))
        stream.put(sse.DONE)
    stream.end()


def chat_object(
    head: Head, answers: Sequence[Answer], usage: Usage, *, tokenizer: Tokenizer, version: str
) -> dict[str, Any]:
    """A whole chat completion."""
    choices = [_chat_choice(index, answer, tokenizer) for index, answer in enumerate(answers)]
    return _whole(head.fields("chat.completion"), choices, usage, version)


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


def text_object(
    head: Head,
    answers: Sequence[Answer],
    usage: Usage,
    *,
    tokenizer: Tokenizer,
    version: str,
    prompts: Sequence[EchoedPrompt],
) -> dict[str, Any]:
    """A whole text completion. `prompts`: of each choice."""
    choices = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logprobs = None
        if answer.logprobs or answer.prompt_logprobs:
            scores = TextLogprobs(tokenizer, prompt.ids)
            logprobs = scores.fields(answer.prompt_logprobs, answer.logprobs)
        choice = {
            "index": index,
            "text": prompt.echo + answer.text,
            "logprobs": logprobs,
            "finish_reason": answer.finish,
            "matched_stop": answer.matched_stop,
        }
        choices.append(choice)
    return _whole(head.fields("text_completion"), choices, usage, version)


def _whole(
    fields: dict[str, Any], choices: list[dict[str, Any]], usage: Usage, version: str
) -> dict[str, Any]:
    metadata = {"weight_version": version}
    return {**fields, "choices": choices, "usage": usage_fields(usage), "metadata": metadata}


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


def chat_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        {
            **_token_fields(tokenizer, score.token, score.logprob),
            "top_logprobs": [_token_fields(tokenizer, *pair) for pair in score.top],
        }
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _token_fields(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = list(tokenizer.token_bytes(token))
    return {"token": tokenizer.piece(token), "logprob": _finite(logprob), "bytes": raw}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


class TextLogprobs:
    """The log-probabilities of one text completion; offsets go on from call to call."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._first_id = prompt_ids[0]
        self._detokenizer = open_detokenizer(tokenizer)
        self._offset = 0

    def fields(
        self, prompt: PromptLogprobs | None, scores: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        """`prompt` comes with the first call or never. Its first token has no probability."""
        entries = [*(prompt or ()), *scores]
        ids = [self._first_id if entry is None else entry.token for entry in entries]
        return {
            "tokens": [self._tokenizer.piece(token) for token in ids],
            "token_logprobs": [entry and _finite(entry.logprob) for entry in entries],
            "top_logprobs": [entry and self._top(entry) for entry in entries],
            "text_offset": [self._offset_of(token) for token in ids],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The best tokens and, as clients expect, the chosen one among them."""
        pairs = [*entry.top, (entry.token, entry.logprob)]
        return {self._tokenizer.piece(token): _finite(logprob) for token, logprob in pairs}

    def _offset_of(self, token: int) -> int:
        """Characters before the token; one that completes a character begins with it."""
        offset = self._offset
        self._offset += len(self._detokenizer.push(token))
        return offset
