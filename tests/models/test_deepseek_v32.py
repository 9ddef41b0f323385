from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kttrio.layers.indexer import Indexer
from kttrio.models import deepseek_v3
from kttrio.models.base import CacheShape, read_config
from kttrio.models.deepseek_v32 import parse
from kttrio.weights.checkpoint import CheckpointError
from tests.golden import FIXTURES, LENGTH, load_golden, reference_model, run_alone
from tests.models.mistakes import distance_after, each_mistake

SOURCE = FIXTURES / "deepseek_v32"
NAMES = ("deepseek_v32", "deepseek_v32_fp8")
pytestmark = pytest.mark.usefixtures("inference")


def indexers(model):
    return [layer.mixer.indexer for layer in model.layers]


# Each of these is one thing that is easily got wrong; done wrong, the golden logits must notice.


def index_rope_interleaved(model):
    for indexer in indexers(model):
        indexer.shape = replace(indexer.shape, interleaved=True)


def index_rope_on_the_last_dimensions(model):
    """Where latent attention has it."""
    for indexer in indexers(model):
        indexer._turned = LastTurned(indexer.rope.dim)


class LastTurned:
    def __init__(self, dim):
        self.dim = dim

    def __call__(self, x, rotation):
        return torch.cat((x[..., : -self.dim], rotation.apply(x[..., -self.dim :])), -1)


class ReluAfterTheSum(Indexer):
    def _scores(self, inputs, keys):
        query = self.query_proj(inputs.latent)
        query = query.view(*query.shape[:2], self.shape.heads, self.shape.head_dim)
        by_head = torch.einsum("nqhd,nkd->nqhk", self._turned(query, inputs.rotation), keys)
        return torch.einsum("nqh,nqhk->nqk", self.head_weights(inputs.hidden), by_head).relu()


class WeightsInsideTheRelu(Indexer):
    def _scores(self, inputs, keys):
        query = self.query_proj(inputs.latent)
        query = query.view(*query.shape[:2], self.shape.heads, self.shape.head_dim)
        by_head = torch.einsum("nqhd,nkd->nqhk", self._turned(query, inputs.rotation), keys)
        weights = self.head_weights(inputs.hidden).unsqueeze(-1)
        return (weights * by_head).relu().sum(2)


def relu_after_the_sum_over_heads(model):
    for indexer in indexers(model):
        indexer.__class__ = ReluAfterTheSum


def weights_inside_the_relu(model):
    """They may be negative."""
    for indexer in indexers(model):
        indexer.__class__ = WeightsInsideTheRelu


def index_keys_not_normed(model):
    for indexer in indexers(model):
        indexer.key_norm = torch.nn.Identity()


def index_key_norm_without_bias(model):
    for indexer in indexers(model):
        indexer.key_norm.bias.zero_()


def index_key_norm_without_centring(model):
    """An RMS norm, as all others are."""
    for indexer in indexers(model):
        norm = torch.nn.RMSNorm(indexer.shape.head_dim, eps=1e-6)
        norm.weight = indexer.key_norm.weight
        indexer.key_norm = norm


def all_keys_attended(model):
    for indexer in indexers(model):
        indexer.shape = replace(indexer.shape, top_k=1000)


def one_choice_for_all_layers(model):
    for layer in model.layers[1:]:
        layer.mixer.indexer, layer.mixer.follows = None, True


@each_mistake(
    index_rope_interleaved,
    index_rope_on_the_last_dimensions,
    relu_after_the_sum_over_heads,
    weights_inside_the_relu,
    index_keys_not_normed,
    index_key_norm_without_bias,
    index_key_norm_without_centring,
    all_keys_attended,
    one_choice_for_all_layers,
)
@pytest.mark.parametrize("name", NAMES)
def test_the_golden_logits_notice_a_mistake(name, mistake):
    assert distance_after(mistake, FIXTURES / name) > 1e-2


class ForgetsWhileDense(Indexer):
    def forward(self, hidden, query_latent, step, cache):
        if all(group.num_keys <= self.shape.top_k for group in step.spans.groups):
            cache.index_key.flatten(0, 1).index_fill_(0, step.batch.kv_index, 0.0)
            return [None] * len(step.spans.groups)
        return super().forward(hidden, query_latent, step, cache)


@pytest.mark.parametrize("name", NAMES)
def test_the_golden_logits_notice_index_keys_not_stored_while_dense(name):
    golden = load_golden(FIXTURES / name)
    model, errors = reference_model(FIXTURES / name), []
    chunks = (indexers(model)[0].shape.top_k, 1, 28)
    for _ in range(2):
        logits = run_alone(model, golden["input_ids"].tolist(), chunks)
        errors.append(float((logits - golden["logits"]).abs().max()))
        for indexer in indexers(model):
            indexer.__class__ = ForgetsWhileDense
    assert errors[0] < 1e-3
    assert errors[1] > 1e-2


@pytest.mark.parametrize("chunks", [(LENGTH,), (1,) * LENGTH, (13, 28)], ids=str)
def test_with_as_many_keys_as_tokens_it_is_dense_attention_to_the_bit(chunks):
    golden = load_golden(SOURCE)
    models = [reference_model(SOURCE) for _ in range(2)]
    for layer in models[0].layers:
        layer.mixer.indexer.shape = replace(layer.mixer.indexer.shape, top_k=LENGTH)
    for layer in models[1].layers:
        layer.mixer.indexer = None
    dense, sparse = (run_alone(model, golden["input_ids"].tolist(), chunks) for model in models)
    assert torch.equal(dense, sparse)
    assert (dense - golden["logits"]).abs().max() > 1e-2


# The config.


@pytest.fixture
def raw():
    return read_config(SOURCE)


def test_it_is_deepseek_v3_with_indexers(raw):
    spec, plain = parse(raw), deepseek_v3.parse(raw)
    mixer = spec.layers[0].mixer
    assert mixer.indexer.top_k == 12
    assert not mixer.indexer.interleaved
    assert [replace(x.mixer, indexer=None) for x in spec.layers] == [x.mixer for x in plain.layers]
    assert spec.mtp.layer.mixer == mixer
    assert replace(spec, layers=plain.layers, mtp=plain.mtp) == plain


def test_index_keys_count_in_the_cache(raw):
    cached = CacheShape(2 * (40 + 16), 0, bytes_chosen=4 * 12)
    assert parse(raw).layers[0].mixer.cache_shape(torch.bfloat16) == cached
    assert deepseek_v3.parse(raw).layers[0].mixer.cache_shape(torch.float32).bytes_per_token == 160


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_topk": None}, "index_topk is missing"),
        ({"index_head_dim": 4}, "index_head_dim 4 is less than the 8 dimensions"),
        ({"q_lora_rank": None}, "q_lora_rank is missing; the indexer asks with it"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(raw, change, message):
    with pytest.raises(CheckpointError, match=message):
        parse(raw | change)
