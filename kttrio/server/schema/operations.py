"""Routes as data: what /openapi.json tells of each. A protocol lists its own, beside its blueprint.

The document itself is written in openapi.py. Not here: bodies, which are records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kttrio.server.schema.records import schema

Schema = Mapping[str, Any]

ANY: Schema = MappingProxyType({})
STRING: Schema = MappingProxyType({"type": "string"})
INTEGER: Schema = MappingProxyType({"type": "integer"})
NUMBER: Schema = MappingProxyType({"type": "number"})
BOOLEAN: Schema = MappingProxyType({"type": "boolean"})
NULL: Schema = MappingProxyType({"type": "null"})
OBJECT: Schema = MappingProxyType({"type": "object"})


def record_of(required: Mapping[str, Schema], **optional: Schema) -> Schema:
    """An object with these fields. More may come: clients ignore what they do not know."""
    told: dict[str, Any] = {"type": "object", "properties": {**required, **optional}}
    return {**told, "required": list(required)} if required else told


def list_of(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def map_of(value: Schema) -> Schema:
    """An object whose names are not known before."""
    return {"type": "object", "additionalProperties": value}


def nullable(told: Schema) -> Schema:
    return {"anyOf": [told, NULL]}


def one_of(*words: str) -> Schema:
    return {"enum": list(words)}


ERROR: Schema = record_of(
    {
        "error": record_of(
            {
                "message": STRING,
                "type": STRING,
                "param": nullable(STRING),
                "code": nullable(STRING),
            }
        )
    }
)
"""OpenAI's error object, as errors.error_body writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """What stands in a path, a query or a header."""

    name: str
    help: str
    place: str = "path"
    told: Schema = field(default_factory=lambda: STRING)

    @property
    def required(self) -> bool:
        return self.place == "path"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path.

    `body`: the record of the JSON body; None: it has none. `answer`: the JSON of a 200; None: an
    answer without a body, or one of another `answer_type`. `error`: the JSON of all that is
    refused; None: without a body.
    """

    method: str
    """get, post, ..."""
    path: str
    """With its parameters in braces: /v1/models/{name}."""
    summary: str
    tag: str
    """The protocol."""
    body: type | None = None
    other_bodies: tuple[str, ...] = ()
    """Content types that are taken beside JSON."""
    answer: Schema | None
    answer_type: str = "application/json"
    streams: bool = False
    """Answers as server-sent events where the body asks for them."""
    other_answers: tuple[str, ...] = ()
    """Content types that a client can ask for beside that."""
    error: Schema | None = field(default_factory=lambda: ERROR)
    parameters: tuple[Parameter, ...] = ()
    open: bool = False
    """Needs no API key."""

    def document(self) -> dict[str, Any]:
        """The operation object of OpenAPI 3.1."""
        told: dict[str, Any] = {
            "operationId": self.operation_id,
            "summary": self.summary,
            "tags": [self.tag],
            "responses": self._responses(),
        }
        if self.parameters:
            told["parameters"] = [_parameter(one) for one in self.parameters]
        if self.body is not None:
            told["requestBody"] = self._request_body(self.body)
        if self.open:
            told["security"] = []
        return told

    @property
    def operation_id(self) -> str:
        words = self.path.replace("{", "").replace("}", "").split("/")
        return "_".join(word for word in (self.method, *words) if word)

    def _request_body(self, body: type) -> dict[str, Any]:
        told = {"$ref": f"#/components/schemas/{body.__name__}"}
        content: dict[str, Any] = {"application/json": {"schema": told}}
        content |= {kind: {} for kind in self.other_bodies}
        return {"required": "required" in schema(body), "content": content}

    def _responses(self) -> dict[str, Any]:
        content: dict[str, Any] = {}
        if self.answer is not None:
            content[self.answer_type] = {"schema": self.answer}
        if self.streams:
            content["text/event-stream"] = {}  # JSON Schema has no words for events
        content |= {kind: {"schema": STRING} for kind in self.other_answers}
        answer = {"description": "The answer.", **({"content": content} if content else {})}
        return {"200": answer, "4XX": self._refusal(), "5XX": self._refusal()}

    def _refusal(self) -> dict[str, Any]:
        if self.error is None:
            return {"description": "Refused, without a word."}
        content = {"application/json": {"schema": self.error}}
        return {"description": "Refused; the body says why.", "content": content}


def _parameter(one: Parameter) -> dict[str, Any]:
    return {
        "name": one.name,
        "in": one.place,
        "description": one.help,
        "required": one.required,
        "schema": one.told,
    }
