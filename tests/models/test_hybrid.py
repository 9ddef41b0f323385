"""What Qwen3-Next and Qwen3.5 share: each thing that is easily got wrong, done wrong on purpose."""

from __future__ import annotations

import pytest
import torch

from kttrio.layers import delta_rule
from kttrio.layers.attention import Attention
from kttrio.layers.deltanet import GatedDeltaNet
from tests.golden import (
    FIXTURES,
    LENGTH,
    load_golden,
    mixers,
    reference_model,
    run_alone,
)
from tests.models.mistakes import (
    distance_after,
    each_mistake,
    rope_over_the_whole_head,
    weights_not_renormalised,
)

NAMES = ("qwen3_next", "qwen3_next_fp8", "qwen3_5_moe", "qwen3_5_moe_fp8")
pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request):
    return FIXTURES / request.param


@pytest.fixture(scope="module")
def golden(checkpoint):
    return load_golden(checkpoint)


def queries_first_and_gates_after_them(model):
    """As if q_proj were not alternating head by head."""
    for mixer in mixers(model, Attention):
        heads, rows = mixer.shape.heads, 2 * mixer.shape.heads * mixer.shape.head_dim
        weight = mixer.in_proj.weight
        by_head = weight[:rows].view(2, heads, mixer.shape.head_dim, -1)
        weight[:rows] = by_head.transpose(0, 1).reshape(rows, -1)


def norms_around_zero(model):
    """As if the norms were not zero-centred."""
    for layer in model.layers:
        layer.norm.weight -= 1


def delta_norm_around_one(model):
    """As if the gated norm were zero-centred like the others."""
    for mixer in mixers(model, GatedDeltaNet):
        mixer.norm.weight += 1


def convolution_backwards(model):
    for mixer in mixers(model, GatedDeltaNet):
        mixer.conv.copy_(mixer.conv.flip(0))


def value_heads_read_with_the_wrong_key_heads(model):
    """As if the key heads took turns, instead of serving neighbours."""
    for mixer in mixers(model, GatedDeltaNet):
        keys = 2 * mixer.key_heads * mixer.key_dim
        values = slice(keys, mixer.channels)
        for tensor in (mixer.in_proj.weight[values], mixer.conv[:, values].T):
            turned = tensor.view(mixer.key_heads, -1, mixer.value_dim, tensor.shape[1])
            tensor.copy_(turned.transpose(0, 1).reshape(tensor.shape))


def no_decay(model):
    for mixer in mixers(model, GatedDeltaNet):
        mixer.a_log.fill_(-torch.inf)


def shared_expert_without_gate(model):
    for layer in model.layers:
        layer.mlp.gates[-1] = 0


@each_mistake(
    queries_first_and_gates_after_them,
    norms_around_zero,
    delta_norm_around_one,
    rope_over_the_whole_head,
    convolution_backwards,
    value_heads_read_with_the_wrong_key_heads,
    no_decay,
    shared_expert_without_gate,
    weights_not_renormalised,
)
def test_the_golden_logits_notice_a_mistake(checkpoint, mistake):
    assert distance_after(mistake, checkpoint) > 1e-2


def delta_before_decay(query, key, value, decay, beta, state):
    """`delta_step` as if the delta were taken from the state of yesterday."""
    old = (key.unsqueeze(2) @ state).squeeze(2)
    delta = beta.unsqueeze(2) * (value - old)
    state.mul_(decay.exp()[..., None, None]).addcmul_(key.unsqueeze(3), delta.unsqueeze(2))
    return (query.unsqueeze(2) @ state).squeeze(2)


def output_before_update(query, key, value, decay, beta, state):
    """`delta_step` as if the output did not see its own token."""
    old = state * decay.exp()[..., None, None]
    out = (query.unsqueeze(2) @ old).squeeze(2)
    delta_step(query, key, value, decay, beta, state)
    return out


delta_step = delta_rule.delta_step


@pytest.mark.parametrize(
    "mistake", [delta_before_decay, output_before_update], ids=lambda mistake: mistake.__name__
)
def test_decoding_notices_a_wrong_recurrence(golden, checkpoint, monkeypatch, mistake):
    model, prompt = reference_model(checkpoint), golden["input_ids"].tolist()
    monkeypatch.setattr(delta_rule, "delta_step", mistake)
    logits = run_alone(model, prompt, (1,) * LENGTH)
    assert (logits - golden["logits"]).abs().max() > 1e-2
