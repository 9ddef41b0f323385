from __future__ import annotations

import pytest

from kttrio.weights.declared import declared_format, declared_fp8
from kttrio.weights.loader import Part


def in_fp8(name: str, **fields: object) -> bool:
    raw = {"quantization_config": {"quant_method": "fp8"} | fields}
    return declared_fp8(raw)(Part(f"{name}.weight", (256, 256)))


def test_without_the_section_nothing_is_quantised():
    assert not declared_fp8({})(Part("model.layers.0.mlp.up_proj.weight", (256, 256)))
    assert declared_format({}) == "bf16"
    assert declared_format({"quantization_config": {"quant_method": "fp8"}}) == "fp8"


@pytest.mark.parametrize("field", ["modules_to_not_convert", "ignored_layers"])
@pytest.mark.parametrize(
    ("listed", "name", "expected"),
    [
        ("model.layers.3.self_attn.o_proj", "model.layers.3.self_attn.o_proj", False),
        ("model.layers.3.self_attn.o_proj", "model.layers.13.self_attn.o_proj", True),
        ("gate", "model.layers.3.mlp.gate", False),
        ("gate", "model.layers.3.mlp.gate_proj", True),
        ("model.layers.3", "model.layers.3.mlp.up_proj", False),
        ("model.layers.3", "model.layers.30.mlp.up_proj", True),
    ],
)
def test_what_is_listed_stays_as_it_was(field, listed, name, expected):
    assert in_fp8(name, **{field: [listed]}) is expected
    assert in_fp8(name, **{field: None})


@pytest.mark.parametrize(
    "name", ["lm_head", "model.layers.61.eh_proj", "model.layers.0.self_attn.indexer.weights_proj"]
)
def test_some_never_are_quantised(name):
    assert not in_fp8(name)
