"""What /v1/responses answers, as JSON Schema for /openapi.json. Made in output.py."""

from __future__ import annotations

from kttrio.server.schema.operations import (
    ANY,
    BOOLEAN,
    INTEGER,
    NULL,
    NUMBER,
    OBJECT,
    STRING,
    list_of,
    map_of,
    nullable,
    one_of,
    record_of,
)

FALSE = {"const": False}
_TOKEN = {"token": STRING, "logprob": NUMBER, "bytes": list_of(INTEGER)}
_LOGPROBS = list_of(record_of({**_TOKEN, "top_logprobs": list_of(record_of(_TOKEN))}))
_END = one_of("completed", "incomplete")
_MESSAGE = record_of(
    {
        "id": STRING,
        "type": one_of("message"),
        "role": one_of("assistant"),
        "status": _END,
        "content": list_of(
            record_of(
                {
                    "type": one_of("output_text"),
                    "text": STRING,
                    "annotations": {"type": "array", "maxItems": 0},
                    "logprobs": _LOGPROBS,
                }
            )
        ),
    }
)
_REASONING = record_of(
    {
        "id": STRING,
        "type": one_of("reasoning"),
        "status": _END,
        "encrypted_content": STRING,
        "summary": list_of(record_of({"type": one_of("summary_text"), "text": STRING})),
    },
    content=list_of(record_of({"type": one_of("reasoning_text"), "text": STRING})),
)
_CALL = record_of(
    {
        "id": STRING,
        "type": one_of("function_call"),
        "status": _END,
        "call_id": STRING,
        "name": STRING,
        "arguments": STRING,
    }
)
_TOOL = record_of(
    {
        "type": one_of("function"),
        "name": STRING,
        "description": nullable(STRING),
        "parameters": nullable(OBJECT),
        "strict": nullable(BOOLEAN),
    }
)
_USAGE = record_of(
    {
        "input_tokens": INTEGER,
        "input_tokens_details": record_of(
            {"cached_tokens": INTEGER, "cache_write_tokens": INTEGER}
        ),
        "output_tokens": INTEGER,
        "output_tokens_details": record_of({"reasoning_tokens": INTEGER}),
        "total_tokens": INTEGER,
    }
)
RESPONSE = record_of(
    {
        "id": STRING,
        "object": one_of("response"),
        "created_at": INTEGER,
        "completed_at": nullable(INTEGER),
        "status": one_of("completed", "incomplete", "cancelled"),
        "error": NULL,
        "incomplete_details": nullable(record_of({"reason": one_of("max_output_tokens")})),
        "background": FALSE,
        "instructions": nullable(STRING),
        "max_output_tokens": nullable(INTEGER),
        "max_tool_calls": NULL,
        "metadata": map_of(STRING),
        "model": STRING,
        "output": list_of({"anyOf": [_MESSAGE, _REASONING, _CALL]}),
        "parallel_tool_calls": BOOLEAN,
        "previous_response_id": NULL,
        "reasoning": OBJECT,
        "service_tier": one_of("default"),
        "store": FALSE,
        "temperature": NUMBER,
        "text": OBJECT,
        "tool_choice": {"type": ["string", "object"]},
        "tools": list_of(_TOOL),
        "top_logprobs": INTEGER,
        "top_p": NUMBER,
        "truncation": one_of("disabled"),
        "usage": _USAGE,
        "user": ANY,
    }
)
COUNT = record_of({"object": one_of("response.input_tokens"), "input_tokens": INTEGER})
