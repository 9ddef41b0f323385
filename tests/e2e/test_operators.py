"""What operators meet on a real server: Prometheus' scrape, the log, keys and abort."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import Server, running_server


def ask(server: Server, path: str, body: object = None, **headers: str) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, headers)
    return urllib.request.urlopen(request, timeout=60)


def scrape(server: Server) -> dict[str, float]:
    """The sums over all labels, by name."""
    with ask(server, "/metrics") as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def scrape_when_idle(server: Server) -> dict[str, float]:
    """What an earlier test has left behind may still be on its way out."""
    deadline = time.monotonic() + 30
    while (found := scrape(server))["vllm:num_requests_running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def test_a_scrape_knows_what_a_client_did(
    server: Server, client: openai.OpenAI, model: str
) -> None:
    before = scrape_when_idle(server)
    raw = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": "Hello!"}],
        max_tokens=20,
        extra_body={"ignore_eos": True},
        extra_headers={"X-Request-Id": "mine"},
    )
    assert raw.headers["x-request-id"] == "mine"
    after = scrape(server)
    grown = {name: after[name] - before[name] for name in before}
    assert grown["vllm:generation_tokens_total"] == 20
    assert grown["vllm:prompt_tokens_total"] == raw.parse().usage.prompt_tokens
    assert grown["vllm:request_success_total"] == 1
    assert grown["vllm:inter_token_latency_seconds_count"] == 19
    assert grown["kttrio:step_seconds_count"] == grown["kttrio:steps_total"] == 20
    assert 0 < grown["kttrio:step_seconds_sum"] < grown["vllm:e2e_request_latency_seconds_sum"]
    assert grown["kttrio:event_loop_lag_seconds_count"] > 0
    server.wait_for(r"path=/v1/chat/completions status=200 .*request=mine .*finish=length")


def test_keys_and_abort() -> None:
    flags = ("--api-key", "k-one", "--api-key", "k-two", "--admin-api-key", "k-boss")
    with running_server(*flags) as server:
        for key, code in (("k-one", 200), ("k-two", 200), ("k-boss", 200), ("k-three", 401)):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
                if code == 200:
                    assert client.models.list().data
                else:
                    with pytest.raises(openai.AuthenticationError):
                        client.models.list()
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(server, "/abort_request", {"abort_all": True}, Authorization="Bearer k-one")
        assert caught.value.code == 403
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k-one", max_retries=0) as client:
            chunks = client.chat.completions.create(
                model="kttrio-demo",
                messages=[{"role": "user", "content": "Hello!"}],
                max_tokens=3000,
                stream=True,
                extra_body={"ignore_eos": True, "rid": "my-own"},
            )
            next(chunks)
            with ask(
                server, "/abort_request", {"rid": "my-own"}, **{"X-Api-Key": "k-boss"}
            ) as done:
                assert json.load(done) == {"aborted": 1}
            assert list(chunks)[-1].choices[0].finish_reason == "abort"
        server.wait_for(r"finish=abort")
        assert server.stop() == 0
    assert "k-" not in server.output
