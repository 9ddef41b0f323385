"""What Anthropic's routes answer, as JSON Schema: the answers of response.py."""

from __future__ import annotations

from kttrio.server.schema.operations import (
    INTEGER,
    OBJECT,
    STRING,
    Schema,
    list_of,
    nullable,
    one_of,
    record_of,
)

_TEXT = record_of({"type": one_of("text"), "text": STRING})
_THINKING = record_of({"type": one_of("thinking"), "thinking": STRING, "signature": STRING})
_CALL = record_of({"type": one_of("tool_use"), "id": STRING, "name": STRING, "input": OBJECT})
_USAGE = record_of(
    {
        "input_tokens": INTEGER,
        "cache_creation_input_tokens": INTEGER,
        "cache_read_input_tokens": INTEGER,
        "output_tokens": INTEGER,
        "output_tokens_details": record_of({"thinking_tokens": INTEGER}),
    }
)
MESSAGE: Schema = record_of(
    {
        "id": STRING,
        "type": one_of("message"),
        "role": one_of("assistant"),
        "model": STRING,
        "content": list_of({"oneOf": [_TEXT, _THINKING, _CALL]}),
        "stop_reason": one_of(
            "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
        ),
        "stop_sequence": nullable(STRING),
        "usage": _USAGE,
    }
)
COUNT: Schema = record_of({"input_tokens": INTEGER})
ERROR: Schema = record_of(
    {
        "type": one_of("error"),
        "error": record_of({"type": STRING, "message": STRING}, details=OBJECT),
        "request_id": nullable(STRING),
    }
)
