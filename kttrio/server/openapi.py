"""/openapi.json: the whole API in OpenAPI 3.1, from the records that check its requests.

What it tells of each route the protocols say themselves (operations.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from quart import Blueprint, Response
from quart_trio.wrappers import TrioResponse

from kttrio.server.operations import OBJECT, Operation
from kttrio.server.records import schema

PATH = "/openapi.json"
VERSION = "1"
"""Of the API: paths and fields that clients build on."""
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}
OPERATIONS = (
    Operation(method="get", path=PATH, summary="This document.", tag="Operation", answer=OBJECT),
)


def blueprint(operations: Iterable[Operation], *, keyed: bool) -> Blueprint:
    """The route that tells of all routes. `keyed`: they ask for an API key."""
    routes = Blueprint("openapi", __name__)
    told = json.dumps(document([*operations, *OPERATIONS], keyed=keyed), default=dict)

    @routes.get(PATH)
    async def openapi() -> Response:
        return TrioResponse(told, content_type="application/json")

    return routes


def document(operations: Iterable[Operation], *, keyed: bool) -> dict[str, Any]:
    """The OpenAPI document of these operations."""
    paths: dict[str, dict[str, Any]] = {}
    bodies: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = operation.document()
        if operation.body is not None:
            bodies[operation.body.__name__] = schema(operation.body)
    told = {
        "openapi": "3.1.0",
        "info": {"title": "kttrio", "version": VERSION},
        "paths": paths,
        "components": {"schemas": bodies},
    }
    return _with_keys(told) if keyed else told


def _with_keys(told: dict[str, Any]) -> dict[str, Any]:
    keys: list[dict[str, Any]] = [{name: []} for name in KEYS]
    components = {**told["components"], "securitySchemes": KEYS}
    return {**told, "components": components, "security": keys}
