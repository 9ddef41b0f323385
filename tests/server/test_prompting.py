"""Sequences from requests: seeds, the context check, the model's text side."""

from __future__ import annotations

from pathlib import Path

import pytest

from kttrio.config import ConfigError, ServerConfig
from kttrio.server.errors import BadRequestError
from kttrio.server.prompting import ServedModel, check_length, choice_seed
from tests.tokenizers_fake import make_tiny_tokenizer


def test_the_seeds_of_choices_are_far_apart_and_reproducible() -> None:
    seeds = [choice_seed(seed, i) for seed in range(50) for i in range(128)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert choice_seed(7, 0) == 7
    assert choice_seed(7, 3) == choice_seed(7, 3)


def test_the_context_check_is_exact() -> None:
    check_length(60, 4, 64)
    with pytest.raises(BadRequestError, match="65: 60 in the prompt, 5 to"):
        check_length(60, 5, 64)
    with pytest.raises(BadRequestError, match="at least one"):
        check_length(0, 1, 64)


def test_a_checkpoint_says_how_it_is_served(tmp_path: Path) -> None:
    directory = make_tiny_tokenizer(tmp_path / "some-model")
    model = ServedModel.load(directory, ServerConfig())
    assert model.name == "some-model"
    assert model.tool_call_parser == "qwen3_coder"
    assert model.reasoning_parser is None
    assert len(model.end_ids) == 2


def test_settings_go_before_the_checkpoint(tmp_path: Path) -> None:
    directory = make_tiny_tokenizer(tmp_path)
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}<think>")
    config = ServerConfig(served_model_name="x", chat_template=template)
    model = ServedModel.load(directory, config)
    assert (model.name, model.tool_call_parser, model.reasoning_parser) == ("x", None, "qwen3")


@pytest.mark.parametrize("name", ["tool_call_parser", "reasoning_parser"])
def test_an_unknown_parser_is_a_config_error(name: str, tmp_path: Path) -> None:
    config = ServerConfig(**{name: "nonsense"})
    with pytest.raises(ConfigError, match="nonsense"):
        ServedModel.load(make_tiny_tokenizer(tmp_path), config)
