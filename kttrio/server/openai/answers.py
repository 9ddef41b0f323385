"""What OpenAI's routes answer, as JSON Schema for /openapi.json. Made in response.py."""

from __future__ import annotations

from kttrio.server.schema.operations import (
    BOOLEAN,
    INTEGER,
    NULL,
    NUMBER,
    STRING,
    Schema,
    list_of,
    map_of,
    nullable,
    one_of,
    record_of,
)

_TOKEN = {"token": STRING, "logprob": NUMBER, "bytes": nullable(list_of(INTEGER))}
_CHAT_LOGPROBS = record_of(
    {
        "content": list_of(record_of({**_TOKEN, "top_logprobs": list_of(record_of(_TOKEN))})),
        "refusal": NULL,
    }
)
_TEXT_LOGPROBS = record_of(
    {
        "tokens": list_of(STRING),
        "token_logprobs": list_of(nullable(NUMBER)),
        "top_logprobs": list_of(nullable(map_of(NUMBER))),
        "text_offset": list_of(INTEGER),
    }
)
_CALL = record_of(
    {
        "id": STRING,
        "type": one_of("function"),
        "function": record_of({"name": STRING, "arguments": STRING}),
    }
)
_MESSAGE = record_of(
    {
        "role": one_of("assistant"),
        "content": nullable(STRING),
        "refusal": NULL,
        "reasoning_content": nullable(STRING),
        "tool_calls": nullable(list_of(_CALL)),
    }
)
_CHOICE = {
    "index": INTEGER,
    "finish_reason": one_of("stop", "length", "tool_calls", "abort"),
    "matched_stop": {"type": ["integer", "string", "null"]},
}
_PROMPT_DETAILS = record_of({"cached_tokens": INTEGER})
_COMPLETION_DETAILS = record_of(
    {"reasoning_tokens": INTEGER},
    accepted_prediction_tokens=INTEGER,
    rejected_prediction_tokens=INTEGER,
)
USAGE = record_of(
    {
        "prompt_tokens": INTEGER,
        "total_tokens": INTEGER,
        "completion_tokens": INTEGER,
        "prompt_tokens_details": _PROMPT_DETAILS,
        "completion_tokens_details": _COMPLETION_DETAILS,
        "reasoning_tokens": INTEGER,
    }
)
_WHOLE = {
    "id": STRING,
    "created": INTEGER,
    "model": STRING,
    "usage": USAGE,
    "metadata": record_of({"weight_version": STRING}),
}
_IDS = list_of(INTEGER)


def _answer(kind: str, choice: Schema) -> Schema:
    told = {**_WHOLE, "object": one_of(kind), "choices": list_of(choice)}
    return record_of(told, prompt_token_ids=_IDS)


CHAT = _answer(
    "chat.completion",
    record_of(
        {**_CHOICE, "message": _MESSAGE, "logprobs": nullable(_CHAT_LOGPROBS)}, token_ids=_IDS
    ),
)
TEXT = _answer(
    "text_completion",
    record_of(
        {**_CHOICE, "text": STRING, "logprobs": nullable(_TEXT_LOGPROBS)},
        token_ids=_IDS,
        prompt_token_ids=_IDS,
    ),
)
MODEL = record_of(
    {
        "id": STRING,
        "object": one_of("model"),
        "created": INTEGER,
        "owned_by": STRING,
        "max_model_len": INTEGER,
        "type": one_of("model"),
        "display_name": STRING,
        "created_at": STRING,
        "max_input_tokens": INTEGER,
        "lifecycle": one_of("active"),
    }
)
MODELS = record_of(
    {
        "object": one_of("list"),
        "data": list_of(MODEL),
        "has_more": BOOLEAN,
        "first_id": STRING,
        "last_id": STRING,
    }
)
TOKENS = record_of(
    {"tokens": _IDS, "count": INTEGER, "max_model_len": INTEGER}, token_strs=list_of(STRING)
)
DETOKENIZED = record_of({"prompt": STRING, "text": STRING, "content": STRING})
