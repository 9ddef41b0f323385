"""Paths that are not here: those that clients know from other servers, and slips of base URLs."""

from __future__ import annotations

import re
from collections.abc import Container
from types import MappingProxyType

_NO_POOLING = "this server generates text; its models make no embeddings or scores"
_NO_STORE = "this server stores nothing"
_NO_ADAPTERS = "this server has no adapters"
_NO_TOOLS = "there is no tracing, logging or shared memory over this protocol"
_TRITON = re.compile("/trace/setting$|^/v2/(logging|systemsharedmemory|cudasharedmemory)(/|$)")
_REASONS = MappingProxyType(
    {
        **dict.fromkeys(("embeddings", "rerank", "score", "classify", "pooling"), _NO_POOLING),
        **dict.fromkeys(("encode", "moderations"), _NO_POOLING),
        **dict.fromkeys(("files", "uploads", "batches", "threads", "assistants"), _NO_STORE),
        **dict.fromkeys(("vector_stores", "conversations", "containers"), _NO_STORE),
        **dict.fromkeys(("load_lora_adapter", "unload_lora_adapter"), _NO_ADAPTERS),
        "fine_tuning": "this server does not train",
        "audio": "this server reads and writes text",
        "realtime": "this server reads and writes text",
        "images": "this server writes text; images come in the messages of /v1/chat/completions",
        "generate": "POST to /v1/completions, or to /v2/models/MODEL/generate",
        "completion": "POST to /v1/completions",
        "infill": "this server does not fill in the middle",
        "api": "this server has the paths of OpenAI, Anthropic and Triton, not of Ollama",
    }
)


def reason(path: str) -> str | None:
    """Why there is nothing at a path that other servers have; None: they do not have it either."""
    if path.startswith("/v2/") and _TRITON.search(path):
        return _NO_TOOLS
    first, _, _ = path.removeprefix("/v1").lstrip("/").partition("/")
    return _REASONS.get(first)


def meant(path: str, known: Container[str]) -> str | None:
    """The known path that a client's base URL has missed: by /v1, which it lacks or has twice, or
    by a slash at its end."""
    plain = f"/{path.strip('/')}"
    likely = (plain, f"/v1{plain}", plain.removeprefix("/v1"))
    return next((one for one in likely if one in known), None)
