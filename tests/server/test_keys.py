"""Which key opens what, and what the operator is told who sets none."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from kttrio.config import ServerConfig
from kttrio.server import app
from kttrio.server.errors import ApiError
from kttrio.server.keys import Keys, exposure, presented
from tests.http_front import running_front

USER, OTHER, ADMIN = "user", "schlüssel", "admin"


def status(config: ServerConfig, given: str, *, admin: bool) -> int:
    try:
        Keys(config).check(given.encode(), admin=admin)
    except ApiError as error:
        return error.status
    return 200


# What SGLang does with one flag, the other, or both; ours alone: the admin key opens everything.
@pytest.mark.parametrize(
    ("users", "admin_key", "given", "plain", "operators"),
    [
        ((), None, "", 200, 200),
        ((), None, "anything", 200, 200),
        ((USER, OTHER), None, "", 401, 401),
        ((USER, OTHER), None, "wrong", 401, 401),
        ((USER, OTHER), None, USER, 200, 200),
        ((USER, OTHER), None, OTHER, 200, 200),
        ((), ADMIN, "", 200, 401),
        ((), ADMIN, "wrong", 200, 401),
        ((), ADMIN, ADMIN, 200, 200),
        ((USER,), ADMIN, "", 401, 401),
        ((USER,), ADMIN, USER, 200, 403),
        ((USER,), ADMIN, ADMIN, 200, 200),
        ((USER,), ADMIN, USER + ADMIN, 401, 401),
    ],
)
def test_what_a_key_opens(
    users: tuple[str, ...], admin_key: str | None, given: str, plain: int, operators: int
) -> None:
    config = ServerConfig(api_key=users, admin_api_key=admin_key)
    assert status(config, given, admin=False) == plain
    assert status(config, given, admin=True) == operators


def test_every_key_is_compared_whatever_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return given == known

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = Keys(ServerConfig(api_key=(USER, OTHER), admin_api_key=ADMIN))
    for given in (USER, ADMIN, "wrong"):
        compared.clear()
        with pytest.raises(ApiError) if given == "wrong" else nullcontext():
            keys.check(given.encode(), admin=False)
        assert len(compared) == 3


def test_keys_cannot_be_shown() -> None:
    keys = Keys(ServerConfig(api_key=("k-user-7f",), admin_api_key="k-admin-7f"))
    assert "7f" not in repr(vars(keys)).replace("\\x7f", "")


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "given"),
    [
        ("Bearer k", "", b"k"),
        ("bearer  k ", "other", b"k"),
        ("Basic k", "", b""),
        ("Basic k", "x", b"x"),
        ("", "sch\xfc", b"sch\xfc"),
        ("Bearer", "", b""),
    ],
)
def test_where_a_key_stands(authorization: str, x_api_key: str, given: bytes) -> None:
    assert presented(authorization, x_api_key) == given


@pytest.mark.parametrize(
    ("host", "users", "admin_key", "warned"),
    [
        ("127.0.0.1", (), None, None),
        ("::1", (), None, None),
        ("localhost", (), None, None),
        ("127.8.8.8", (), None, None),
        ("0.0.0.0", (USER,), None, None),
        ("0.0.0.0", (), None, "end the requests of others"),
        ("::", (), ADMIN, "use the model; set"),
        ("box.example", (), None, "--host box.example without --api-key"),
    ],
)
def test_a_port_open_to_others_is_named(
    host: str, users: tuple[str, ...], admin_key: str | None, warned: str | None
) -> None:
    found = exposure(ServerConfig(host=host, api_key=users, admin_api_key=admin_key))
    assert found is None if warned is None else warned in str(found)


OPERATOR_PATHS = (
    ("POST", "/abort_request"),
    ("POST", "/flush_cache"),
    ("GET", "/get_server_info"),
    ("GET", "/server_info"),
    ("POST", "/start_expert_distribution_record"),
    ("POST", "/save_expert_placement"),
)
POLLED_PATHS = (("GET", "/health"), ("GET", "/ping"), ("GET", "/metrics"))


async def test_routes_of_operators_need_the_admin_key() -> None:
    config = ServerConfig(api_key=(USER, OTHER), admin_api_key=ADMIN)
    async with running_front(config=config) as front:
        for method, path in OPERATOR_PATHS:
            for key, wanted in ((USER, 403), ("", 401)):
                reply = await front.ask(method, path, {}, X_Api_Key=key)
                assert (reply.status, path) == (wanted, path)
            assert reply.error()["code"] == "invalid_api_key"
            reply = await front.ask(method, path, {}, Authorization=f"Bearer {ADMIN}")
            assert reply.status not in (401, 403)
        assert (await front.ask("GET", "/v1/models", X_Api_Key=OTHER)).status == 200


async def test_what_is_polled_needs_no_key() -> None:
    config = ServerConfig(api_key=(USER,), admin_api_key=ADMIN)
    async with running_front(config=config) as front:
        for method, path in POLLED_PATHS:
            assert (await front.ask(method, path)).status == 200
        document = (await front.ask("GET", "/openapi.json", X_Api_Key=USER)).json()
        told = {
            path
            for path, methods in document["paths"].items()
            if methods.get("get", {}).get("security") == []
        }
        assert told == {rule.rule for rule in front.app.url_map.iter_rules()} & app.POLLED
        reply = await front.ask("OPTIONS", "/v1/chat/completions")
        assert reply.status == 200
        assert "POST" in reply.headers["allow"]


async def test_no_answer_shows_a_key() -> None:
    config = ServerConfig(api_key=("k-user-7f",), admin_api_key="k-admin-7f")
    async with running_front(config=config) as front:
        for path in (
            "/get_server_info",
            "/metrics",
            "/openapi.json",
            "/get_model_info",
            "/nowhere",
        ):
            reply = await front.ask("GET", path, X_Api_Key="k-admin-7f")
            assert b"7f" not in reply.body
