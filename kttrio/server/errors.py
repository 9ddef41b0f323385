"""What can be wrong with a request, and which HTTP status says so. No protocol's JSON shape but
OpenAI's, which is the default of every route."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ApiError(Exception):
    """A refused request: HTTP status, kind, and what the client should change.

    `param` names the field at fault; `code` is a word for programs. `retry_after` in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Header fields that go with the status."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.retry_after is not None:
            return {"Retry-After": str(max(1, round(self.retry_after)))}
        return {}


class BadRequestError(ApiError):
    """400: the field `param` cannot be served as given."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(400, message, param=param, code=code)


def aborted() -> ApiError:
    """An operator has ended the request, for protocols that have no word for it. A status that no
    client answers by trying again."""
    return ApiError(410, "The server's operator has aborted this request.", code="request_aborted")


def body_too_large(most_bytes: int) -> ApiError:
    """Of a body as it came, or as it was packed."""
    message = f"The request body is larger than the limit of {most_bytes} bytes (--max-body-bytes)."
    return ApiError(413, message)


def check_model(name: str | None, served: str) -> None:
    """A request without `model` means the one that is served."""
    if name is not None and name != served:
        raise unknown_model(name, served)


def unknown_model(name: str, served: str) -> ApiError:
    message = f"The model '{name[:200]}' does not exist; this server has '{served}'."
    return ApiError(404, message, param="model", code="model_not_found")


ErrorShape = Callable[[ApiError], dict[str, Any]]
"""How a protocol writes an error as JSON."""


def error_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object, also the content of an error event in a stream."""
    return {
        "error": {
            "message": error.message,
            "type": error_type(error.status),
            "param": error.param,
            "code": error.code,
        }
    }


def error_type(status: int) -> str:
    """OpenAI's `type` word for an HTTP status."""
    words = {429: "rate_limit_error", 503: "service_unavailable_error"}
    return words.get(status, "invalid_request_error" if status < 500 else "server_error")
