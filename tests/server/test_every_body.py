"""Whatever a record describes, and what lies a step beside it, becomes a request in every protocol,
or is refused by name. OpenAI's chat and completions: test_openai_request.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings

from kttrio.config import ServerConfig
from kttrio.server.anthropic.request import CountBody, MessagesBody, to_answer, to_count
from kttrio.server.errors import ApiError
from kttrio.server.responses.request import ResponsesBody, parse_response
from kttrio.server.schema.records import read, schema
from kttrio.server.served_model import ServedModel
from kttrio.server.triton.request import (
    WHOLE_GENERATE_BODY,
    InferBody,
    read_generate,
    read_infer,
)
from tests.schema_values import nearly_valid, valid
from tests.tokenizers_fake import make_tiny_tokenizer

VOCAB_SIZE = 400
MOST_CHARS = 1000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    directory = make_tiny_tokenizer(tmp_path_factory.mktemp("tiny"))
    return ServedModel.load(directory, ServerConfig(served_model_name="text"))


READERS = {
    "messages": (MessagesBody, lambda value, model: to_answer(read(MessagesBody, value), model)),
    "count_tokens": (CountBody, lambda value, model: to_count(read(CountBody, value), model)),
    "responses": (
        ResponsesBody,
        lambda value, model: parse_response(value, model=model.name, vocab_size=VOCAB_SIZE),
    ),
    "generate": (
        WHOLE_GENERATE_BODY,
        lambda value, _: read_generate(json.dumps(value).encode(), vocab_size=VOCAB_SIZE),
    ),
    "infer": (
        InferBody,
        lambda value, _: read_infer(json.dumps(value).encode(), None, vocab_size=VOCAB_SIZE),
    ),
}


def complaint(reader: Any, value: Any, model: ServedModel) -> ApiError | None:
    try:
        reader(value, model)
    except ApiError as error:
        return error
    return None


@pytest.mark.parametrize("name", READERS)
def test_every_body_is_a_request_or_refused(name: str, model: ServedModel) -> None:
    body, reader = READERS[name]
    shape = schema(body)
    outcomes: list[ApiError | None] = []

    @settings(max_examples=80)
    @given(valid(shape) | nearly_valid(shape))
    def check(value: Any) -> None:
        outcomes.append(complaint(reader, value, model))

    check()
    refused = [error for error in outcomes if error is not None]
    assert refused
    assert all(error.status in (400, 404) for error in refused)
    assert all(0 < len(error.message) < MOST_CHARS for error in refused)
    # Which names of tensors there are is no matter of a schema.
    assert name == "infer" or len(refused) < len(outcomes)
