from __future__ import annotations

import pytest
import torch

from kttrio.models.base import Activations, find_family, model_types, stored_dtype
from kttrio.weights.checkpoint import CheckpointError


def test_every_model_type_has_what_a_family_must_have():
    for name in model_types():
        assert callable(find_family(name).parse)


@pytest.mark.parametrize("name", ["base", "loading", "blocks", "blocks.decoder"])
def test_what_families_share_is_none(name):
    with pytest.raises(CheckpointError, match=f"'{name}' is not supported"):
        find_family(name)


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"dtype": "float32"}, torch.float32),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "torch.float16"}, torch.float16),
        ({}, torch.bfloat16),
        ({"text_config": {"dtype": "float32"}}, torch.float32),
        ({"text_config": {"dtype": "float32"}, "dtype": "float16"}, torch.float16),
        ({"text_config": None}, torch.bfloat16),
    ],
)
def test_both_spellings_of_dtype(fields, dtype):
    assert stored_dtype(fields) is dtype


@pytest.mark.parametrize("name", ["int8", "nn", "fp8"])
def test_a_dtype_must_be_a_float(name):
    with pytest.raises(CheckpointError, match=f"dtype '{name}' is not a float dtype"):
        stored_dtype({"dtype": name})


def test_rows_of_a_long_prompt_are_cut_without_copies():
    rows = Activations.new(10, 4, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert [tensor.dtype for tensor in rows] == [torch.bfloat16, torch.bfloat16, torch.float32]
    pieces = list(rows.first(7).pieces(3))
    assert [len(piece.hidden) for piece in pieces] == [3, 3, 1]
    for number, piece in enumerate(pieces, start=1):
        for tensor in piece:
            tensor.fill_(number)
    for tensor in rows:
        assert tensor[:, 0].tolist() == [1, 1, 1, 2, 2, 2, 3, 0, 0, 0]
