"""Every family, served by a known launch command: it chats, reasons, calls a tool and goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from tests.e2e.conftest import Server, running_server
from tests.golden import FIXTURES

LAUNCH = """--kt-cpuinfer 96 --kt-threadpool-count 2 --kt-num-gpu-experts 100 --kt-method FP8
    --kt-gpu-prefill-token-threshold 2048 --attention-backend triton --trust-remote-code
    --mem-fraction-static 0.80 --chunked-prefill-size 16384 --max-running-requests 4
    --max-total-tokens 256000 --served-model-name NAME --enable-mixed-chunk
    --tensor-parallel-size 1 --enable-p2p-check --disable-shared-experts-fusion
    --disable-custom-all-reduce --fp8-gemm-backend cutlass --kt-enable-dynamic-expert-update"""
PARSERS = {
    "deepseek_v3_chat": "deepseekv31",
    "deepseek_v32_chat": "deepseekv32",
    "glm4_moe_chat": "glm45",
    "glm_moe_dsa_chat": "glm45",
    "kimi_k2_chat": "kimi_k2",
    "minimax_m2_chat": "minimax_m2",
    "qwen3_5_moe_chat": "qwen3_coder",
    "qwen3_moe_chat": "qwen25",
    "qwen3_next_chat": "qwen3_coder",
}
CHATS = sorted(file.parent.name for file in FIXTURES.glob("*_chat/golden.json"))
ARGUMENTS = {"city": "Oslo", "days": 3}


class Served(NamedTuple):
    directory: Path
    server: Server

    @property
    def cases(self) -> list[dict[str, Any]]:
        cases: list[dict[str, Any]] = json.loads((self.directory / "golden.json").read_text())
        return cases


@pytest.fixture(scope="module", params=CHATS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = FIXTURES / request.param
    flags = [
        *("--model", str(directory), "--kt-weight-path", str(directory)),
        *("--tool-call-parser", PARSERS[request.param]),
        *("--kt-cache-dir", str(tmp_path_factory.mktemp("experts"))),
        *LAUNCH.split(),
    ]
    with running_server(*flags) as server:
        yield Served(directory, server)
        assert server.stop() == 0


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.server.client() as client:
        yield client


class Answer(NamedTuple):
    reasoning: str
    content: str
    calls: list[tuple[str, Any]]
    finish: str | None


def expected(case: dict[str, Any]) -> Answer:
    """The golden answer as a client should see it."""
    calls = [("get_weather", ARGUMENTS)] if case["name"] == "call" else []
    thought, closed, said = case["answer"].rpartition("</think>")
    said = "" if calls else re.split(r"<\||<｜|\[e~\[", said)[0]
    reasoning = thought.replace("<think>", "").strip("\n") if closed else ""
    return Answer(reasoning, said.strip("\n"), calls, "tool_calls" if calls else "stop")


def ask(client: openai.OpenAI, case: dict[str, Any], **options: Any) -> Any:
    return client.chat.completions.create(
        model="NAME",
        messages=case["messages"],
        tools=case["tools"] or openai.omit,
        temperature=0,
        max_tokens=100,
        extra_body={"chat_template_kwargs": case["chat_template_kwargs"]},
        **options,
    )


def whole(response: Any) -> Answer:
    (choice,) = response.choices
    message = choice.message
    return Answer(
        getattr(message, "reasoning_content", None) or "",
        message.content or "",
        [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or []],
        choice.finish_reason,
    )


def streamed(chunks: Any) -> Answer:
    reasoning = content = ""
    names: list[str] = []
    arguments: list[str] = []
    finish = None
    for chunk in chunks:
        for choice in chunk.choices:
            finish = finish or choice.finish_reason
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                if call.function.name:
                    names.append(call.function.name)
                    arguments.append("")
                arguments[call.index] += call.function.arguments or ""
    calls = [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]
    return Answer(reasoning, content, calls, finish)


def test_it_answers_as_it_was_taught(served: Served, client: openai.OpenAI) -> None:
    """A greeting, a tool call, the sentence made from its result; whole and streamed."""
    assert {"hi", "call", "result"} <= {case["name"] for case in served.cases}
    for case in served.cases:
        assert whole(ask(client, case)) == expected(case), case["name"]
        assert streamed(ask(client, case, stream=True)) == expected(case), case["name"]


def test_a_turn_goes_on_with_what_the_server_sent(served: Served, client: openai.OpenAI) -> None:
    """The client's own loop: the assistant's message goes back as it came, id included."""
    case = next(case for case in served.cases if case["name"] == "call")
    message = ask(client, case).choices[0].message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    back = message.model_dump(exclude_none=True)
    turn = case | {"messages": [*case["messages"], back, result]}
    assert whole(ask(client, turn)).content == "Oslo expects 3 days of rain."


def test_nothing_of_the_command_line_is_hushed_up(served: Served) -> None:
    output = served.server.output
    idle = " ".join(re.findall("without meaning here: .*", output))
    for flag in ("--attention-backend", "--trust-remote-code", "--kt-num-gpu-experts"):
        assert idle.count(flag) == 1, "named, and only once"
    assert "--max-total-tokens 256000 is reduced to" in output
