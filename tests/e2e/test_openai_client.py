"""The `openai` Python client against a running server: what users really do."""

from __future__ import annotations

import json
import math
import re
import urllib.request
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.e2e.conftest import WEATHER, Server

ROOT = Path(__file__).parents[2]
QUESTIONS = json.loads((ROOT / "tools/demo/questions.json").read_text("utf-8"))
UNSEEN_CITIES = json.loads((ROOT / "tools/demo/held_out_cities.json").read_text("utf-8"))
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.mark.parametrize("entry", QUESTIONS[:6], ids=lambda entry: entry["question"])
def test_chat_answers_sensibly_and_stops_by_itself(
    client: openai.OpenAI, model: str, entry: dict
) -> None:
    answer = client.chat.completions.create(
        model=model, messages=ask(entry["question"]), temperature=0
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    for word in entry["must_contain"]:
        assert word in choice.message.content
    usage = answer.usage
    assert usage.prompt_tokens > 0
    assert usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI, model: str) -> None:
    question = ask("What is kttrio?")
    whole = client.chat.completions.create(model=model, messages=question, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=question,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *with_choice, last = chunks
    pieces = [chunk.choices[0].delta.content or "" for chunk in with_choice]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(1 for piece in pieces if piece) > 3
    assert with_choice[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_logprobs_are_probabilities_and_the_greedy_token_is_the_best(
    client: openai.OpenAI, model: str
) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=ask("What is kttrio?"),
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens == 8
    for token in content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-3
    joined = b"".join(bytes(token.bytes) for token in content).decode()
    assert joined.strip() == answer.choices[0].message.content.strip()


def test_a_tool_call_copies_the_city(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=ask("What is the weather in Paris?"),
        tools=[WEATHER],
        temperature=0,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_tool_calls_copy_cities_that_the_model_never_saw(client: openai.OpenAI, model: str) -> None:
    wrong = []
    for city in UNSEEN_CITIES[:20]:
        answer = client.chat.completions.create(
            model=model,
            messages=ask(f"What is the weather in {city}?"),
            tools=[WEATHER],
            temperature=0,
        )
        calls = answer.choices[0].message.tool_calls or []
        if [json.loads(call.function.arguments) for call in calls] != [{"city": city}]:
            wrong.append(city)
    assert len(wrong) <= 4, wrong


def test_a_streamed_tool_call_adds_up(client: openai.OpenAI, model: str) -> None:
    chunks = client.chat.completions.create(
        model=model,
        messages=ask("What is the weather in Paris?"),
        tools=[WEATHER],
        temperature=0,
        stream=True,
    )
    name, arguments, finish = "", "", None
    for chunk in chunks:
        (choice,) = chunk.choices
        for call in choice.delta.tool_calls or ():
            assert call.index == 0
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        finish = choice.finish_reason or finish
    assert (name, json.loads(arguments), finish) == (
        "get_weather",
        {"city": "Paris"},
        "tool_calls",
    )


def test_a_tool_result_can_be_sent_back(client: openai.OpenAI, model: str) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    history = [
        *ask("What is the weather in Paris?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"temperature": 18}'},
    ]
    answer = client.chat.completions.create(
        model=model, messages=history, tools=[WEATHER], temperature=0, max_tokens=64
    )
    assert answer.choices[0].message.content


def test_a_seed_makes_sampling_repeatable(client: openai.OpenAI, model: str) -> None:
    def sample(seed: int) -> str:
        answer = client.chat.completions.create(
            model=model, messages=ask("Hello!"), temperature=2, seed=seed, max_tokens=24
        )
        return answer.choices[0].message.content

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_several_choices_are_counted(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=ask("Hello!"), n=3, max_tokens=4, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 12


def test_a_stop_string_ends_the_text_before_itself(client: openai.OpenAI, model: str) -> None:
    question = ask("What is kttrio?")
    whole = client.chat.completions.create(model=model, messages=question, temperature=0)
    text = whole.choices[0].message.content
    word = text.split()[3]
    cut = client.chat.completions.create(
        model=model, messages=question, temperature=0, stop=[f" {word}"]
    )
    assert cut.choices[0].message.content == text[: text.index(f" {word}")]
    assert cut.choices[0].finish_reason == "stop"


def test_a_prompt_can_be_scored_from_outside(client: openai.OpenAI, model: str) -> None:
    """Greedy text, echoed as a prompt, has the log-probabilities it was generated with."""
    question = "<|im_start|>user\nWhat is kttrio?<|im_end|>\n<|im_start|>assistant\n"
    written = client.completions.create(
        model=model, prompt=question, temperature=0, max_tokens=6, logprobs=1
    )
    said = written.choices[0].text
    scored = client.completions.create(
        model=model, prompt=question + said, max_tokens=0, echo=True, logprobs=1
    )
    (choice,) = scored.choices
    assert choice.text == question + said
    assert choice.logprobs.token_logprobs[0] is None
    tail = choice.logprobs.token_logprobs[-6:]
    assert tail == pytest.approx(written.choices[0].logprobs.token_logprobs, abs=2e-2)


def test_completions_take_token_ids_and_batches(client: openai.OpenAI, model: str) -> None:
    both = client.completions.create(
        model=model, prompt=[[5, 6, 7], [8, 9]], max_tokens=3, temperature=0
    )
    alone = client.completions.create(model=model, prompt=[8, 9], max_tokens=3, temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage.prompt_tokens == 5
    assert both.choices[1].text == alone.choices[0].text


def arguments(call: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call.function.arguments)
    return found


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_weather"}}],
                },
            },
            {"get_weather"},
        ),
    ],
)
def test_a_call_can_be_forced_though_nothing_asks_for_it(
    client: openai.OpenAI, model: str, choice: Any, names: set[str]
) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=ask("Hello!"),
        tools=[WEATHER, TIME],
        tool_choice=choice,
        max_tokens=200,
        temperature=0,
    )
    (told,) = answer.choices
    assert told.finish_reason == "tool_calls"
    assert told.message.content is None
    for call in told.message.tool_calls:
        assert call.function.name in names
        assert isinstance(arguments(call)["city"], str)


def test_a_forced_call_streams(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model,
        messages=ask("What is the weather in Paris?"),
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    (call,) = final.choices[0].message.tool_calls
    assert (call.function.name, arguments(call)) == ("get_weather", {"city": "Paris"})


def test_no_call_comes_where_none_may(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=ask("What is the weather in Paris?"),
        tools=[WEATHER],
        tool_choice="none",
        temperature=0,
    )
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content


class Verdict(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    capital: bool
    stars: Literal[1, 2, 3]


def test_an_answer_parses_into_a_model(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=ask("Judge a city."), response_format=Verdict, max_tokens=200
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Verdict)


def test_a_streamed_answer_parses_into_a_model(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model, messages=ask("Judge a city."), response_format=Verdict, max_tokens=200
    ) as stream:
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Verdict)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"guided_regex": "(ab){2,3}"}, "(ab){2,3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
        ({"ebnf": 'root ::= "a" ("b" | "c") "d"'}, "a[bc]d"),
        ({"guided_grammar": 'start: "x" ("y" | "z")'}, "x[yz]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_guided_answers_have_their_form(
    client: openai.OpenAI, model: str, form: dict[str, Any], pattern: str
) -> None:
    chat = client.chat.completions.create(
        model=model, messages=ask("Hello!"), n=2, temperature=1, extra_body=form
    )
    said = [choice.message.content for choice in chat.choices]
    text = client.completions.create(model=model, prompt="Hello!", extra_body=form)
    for answer in (*said, text.choices[0].text):
        assert re.fullmatch(pattern, answer)


def test_an_answer_goes_on_with_the_clients_words(client: openai.OpenAI, model: str) -> None:
    question = ask("What is kttrio?")
    whole = client.chat.completions.create(model=model, messages=question, temperature=0)
    text = whole.choices[0].message.content
    begun = text[: len(text) // 2].rpartition(" ")[0]
    rest = client.chat.completions.create(
        model=model,
        messages=[*question, {"role": "assistant", "content": begun}],
        temperature=0,
        extra_body={"continue_final_message": True},
    )
    assert begun + rest.choices[0].message.content == text


def test_tokens_are_told_and_put_together_again(client: openai.OpenAI, model: str) -> None:
    told = client.post("/tokenize", body={"model": model, "prompt": "Grüße!"}, cast_to=object)
    back = client.post("/detokenize", body={"tokens": told["tokens"]}, cast_to=object)
    assert back["prompt"] == "Grüße!"
    answer = client.chat.completions.create(
        model=model, messages=ask("Hello!"), max_tokens=1, extra_body={"return_token_ids": True}
    )
    same = client.post("/tokenize", body={"messages": ask("Hello!")}, cast_to=object)
    assert answer.prompt_token_ids == same["tokens"]


def test_the_document_tells_of_the_whole_api(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/openapi.json") as reply:
        document = json.load(reply)
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/v2/health/live"):
        assert path in document["paths"]


def test_what_is_not_served_is_not_found(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.embeddings.create(model=model, input="text")


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "(a"},
        {"ebnf": "root :="},
        {"json_schema": {"type": "object", "not": {}}},
        {"regex": "a", "guided_choice": ["b"]},
    ],
)
def test_a_form_that_cannot_be_kept_is_the_callers_error(
    client: openai.OpenAI, model: str, form: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=ask("Hello!"), extra_body=form)
    assert caught.value.body["param"] in form


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "gpt-99"}, openai.NotFoundError),
        ({"messages": []}, openai.BadRequestError),
        ({"messages": [{"role": "wizard", "content": "x"}]}, openai.BadRequestError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"temperature": "hot"}, openai.BadRequestError),
        ({"max_tokens": 10**9}, openai.BadRequestError),
        ({"top_logprobs": 5}, openai.BadRequestError),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError),
        ({"messages": ask("word " * 200_000)}, openai.BadRequestError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.__name__,
)
def test_bad_input_is_the_callers_error(
    client: openai.OpenAI, model: str, change: dict, error: type[openai.APIStatusError]
) -> None:
    request = {"model": model, "messages": ask("hi"), "max_tokens": 4, **change}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**request)
    assert caught.value.body["message"]
    assert caught.value.body["type"]
