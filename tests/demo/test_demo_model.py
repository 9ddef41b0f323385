"""The training model: equal to transformers, and what is saved is what was quantised."""

from __future__ import annotations

import json

import pytest
import torch

from tools.demo import save
from tools.demo.model import Model
from tools.train_demo import CONFIG

SMALL = CONFIG | {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_experts": 8}


def small_model():
    torch.manual_seed(3)
    model = Model(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


@pytest.fixture
def written(tmp_path):
    """A small random checkpoint on disk and the model it came from."""
    model = small_model()
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    save.save(model, tmp_path)
    return model, tmp_path


def test_a_row_does_not_depend_on_its_padding_or_its_neighbours():
    model = small_model()
    ids = torch.randint(3, 90, (2, 50))
    with torch.no_grad():
        both = model(ids, torch.tensor([50, 37]))[1, :37]
        alone = model(ids[1:, :37], torch.tensor([37]))[0]
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4)


def test_saved_weights_come_back_as_they_will_be_served(written):
    model, path = written
    loaded = save.load(path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded[name], save.served(name, value), atol=0, rtol=0)


def test_rounding_keeps_each_block_within_an_eighth_of_its_size():
    weight = torch.randn(200, 300) * torch.linspace(0.01, 10, 300)
    small, scale = save.quantise(weight)
    assert scale.shape == (2, 3)
    error = (save.dequantise(small, scale) - weight).abs()
    assert (error <= weight.abs() / 8 + 1e-3 * weight.abs().max()).all()


@pytest.mark.filterwarnings("ignore")
def test_logits_equal_those_of_transformers(written):
    transformers = pytest.importorskip("transformers", reason="the extra `demo` is not installed")
    model = save.load(written[1])
    plain = {key: value for key, value in SMALL.items() if key != "quantization_config"}
    twin = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**plain)).float().eval()
    twin.load_state_dict(model.state_dict())
    ids = torch.randint(3, 90, (2, 75))
    with torch.no_grad():
        found = model.lm_head(model(ids, torch.tensor([75, 75])))
        expected = twin(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
