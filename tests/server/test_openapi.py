"""/openapi.json: it is valid, forgets no route, and tells the truth about answers."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest
from quart_trio import QuartTrio

from kttrio.config import ServerConfig
from kttrio.server.app import PROTOCOLS
from tests.http_front import Front, Reply, running_front

METHODS = {"GET", "POST", "PUT", "DELETE", "PATCH"}


def routes(app: QuartTrio) -> set[tuple[str, str]]:
    """Method and path of every route, its parameters in braces. None of those that only refuse."""
    return {
        (method.lower(), re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        if not rule.endpoint.rpartition(".")[2].startswith("refuse")
        for method in rule.methods & METHODS
    }


def schemas(value: Any) -> list[Any]:
    """Every JSON Schema of the document."""
    if isinstance(value, list):
        return [found for item in value for found in schemas(item)]
    if not isinstance(value, dict):
        return []
    if "schema" in value and "properties" not in value:
        return [value["schema"]]
    return [found for item in value.values() for found in schemas(item)]


async def fetch(front: Front) -> dict[str, Any]:
    document: dict[str, Any] = (await front.ask("GET", "/openapi.json")).json()
    return document


async def test_every_route_is_told_and_none_else() -> None:
    async with running_front() as front:
        told = {
            (method, path)
            for path, methods in (await fetch(front))["paths"].items()
            for method in methods
        }
        assert told == routes(front.app)


async def test_every_schema_is_a_schema() -> None:
    async with running_front() as front:
        document = await fetch(front)
        bodies = document["components"]["schemas"]
        found = [*schemas(document["paths"]), *bodies.values()]
        assert len(found) > 20
        for schema in found:
            jsonschema.Draft202012Validator.check_schema(schema)


async def test_every_body_is_told_by_a_name_of_its_own() -> None:
    bodies = {one.body for protocol in PROTOCOLS for one in protocol.OPERATIONS} - {None}
    async with running_front() as front:
        document = await fetch(front)
    told = {
        one["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        for methods in document["paths"].values()
        for one in methods.values()
        if "requestBody" in one
    }
    named = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert told == named
    assert len(named) == len(bodies)


async def test_operations_have_names_of_their_own_and_tell_their_parameters() -> None:
    async with running_front() as front:
        paths = (await fetch(front))["paths"]
    told = [(path, one) for path, methods in paths.items() for one in methods.values()]
    assert len({one["operationId"] for _, one in told}) == len(told)
    for path, one in told:
        places = {p["name"] for p in one.get("parameters", ()) if p["in"] == "path"}
        assert places == set(re.findall(r"{(\w+)}", path))


@pytest.mark.parametrize("keyed", [True, False])
async def test_keys_are_told_where_they_are_asked_for(keyed: bool) -> None:
    async with running_front(config=ServerConfig(api_key=("key",) * keyed)) as front:
        document = (await front.ask("GET", "/openapi.json", X_Api_Key="key")).json()
    assert ("security" in document) is keyed
    assert document["paths"]["/health"]["get"]["security"] == []


async def test_answers_are_as_told() -> None:
    async with running_front() as front:
        paths = (await fetch(front))["paths"]
        tool = {"type": "function", "function": {"name": "f"}}

        def check(reply: Reply, method: str, path: str, answer: str = "200") -> None:
            told = paths[path][method]["responses"][answer]["content"]["application/json"]
            jsonschema.validate(reply.json(), told["schema"], jsonschema.Draft202012Validator)

        for fields in ({}, {"logprobs": True, "top_logprobs": 2, "n": 2}, {"tools": [tool]}):
            check(await front.chat(**fields), "post", "/v1/chat/completions")
        for fields in ({}, {"logprobs": 2, "echo": True}, {"n": 2}):
            check(await front.complete(**fields), "post", "/v1/completions")
        check(await front.chat(n=0), "post", "/v1/chat/completions", "4XX")
        check(await front.ask("GET", "/v1/models"), "get", "/v1/models")
        check(await front.ask("GET", "/v1/models/tiny"), "get", "/v1/models/{name}")
        check(await front.ask("GET", "/v1/models/tony"), "get", "/v1/models/{name}", "4XX")
        check(await front.ask("GET", "/health"), "get", "/health")
        check(await front.ask("GET", "/health_generate"), "get", "/health_generate")
        check(await front.ask("GET", "/get_model_info"), "get", "/get_model_info")
        check(
            await front.ask("POST", "/save_expert_placement"),
            "post",
            "/save_expert_placement",
            "4XX",
        )
