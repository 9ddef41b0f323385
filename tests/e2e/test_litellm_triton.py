"""`litellm` with `triton/` models: generate, generate_stream and infer of a running server."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.e2e.conftest import Server

# its own types, as pydantic sees them
pytestmark = pytest.mark.filterwarnings("ignore:Item '.*' on TypedDict class:UserWarning")

QUESTION = [{"role": "user", "content": "What is kttrio?"}]


@pytest.fixture
def url(server: Server, model: str) -> str:
    return f"{server.url}/v2/models/{model}"


def test_generate(litellm: ModuleType, url: str, model: str) -> None:
    answer = litellm.completion(
        model=f"triton/{model}",
        messages=QUESTION,
        api_base=f"{url}/generate",
        max_tokens=20,
        top_k=1,
    )
    said = answer.choices[0].message.content
    assert said.startswith("What is kttrio?")
    assert len(said) > len("What is kttrio?")


def test_generate_stream(litellm: ModuleType, url: str, model: str) -> None:
    def pieces() -> list[str]:
        chunks = litellm.completion(
            model=f"triton/{model}",
            messages=QUESTION,
            api_base=f"{url}/generate",
            max_tokens=20,
            top_k=1,
            stream=True,
        )
        return [chunk.choices[0].delta.content or "" for chunk in chunks]

    streamed = pieces()
    assert len([piece for piece in streamed if piece]) > 2
    whole = litellm.completion(
        model=f"triton/{model}",
        messages=QUESTION,
        api_base=f"{url}/generate",
        max_tokens=20,
        top_k=1,
        exclude_input_in_output=True,
    )
    assert "".join(streamed) == whole.choices[0].message.content


def test_infer(litellm: ModuleType, url: str, model: str) -> None:
    answer = litellm.completion(
        model=f"triton/{model}",
        messages=QUESTION,
        api_base=f"{url}/infer",
        max_tokens=20,
        min_p=0.5,
        top_k=1,
    )
    assert answer.choices[0].message.content.startswith("What is kttrio?")


def test_a_refusal_arrives_in_words(litellm: ModuleType, url: str, model: str) -> None:
    with pytest.raises(litellm.BadRequestError, match="'beam_width' is not supported"):
        litellm.completion(
            model=f"triton/{model}",
            messages=QUESTION,
            api_base=f"{url}/generate",
            beam_width=4,
        )
