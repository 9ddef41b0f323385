"""Checkpoints of the published size, as headers alone: every name, shape and dtype is there, but
the files are holes. What is read of a real one before its first weight must accept them."""

from __future__ import annotations

import json
import struct
from math import prod

import pytest
import torch

from kttrio.config import ConfigError, EngineConfig, ExpertConfig
from kttrio.models.base import read_config, stored_dtype
from kttrio.models.loading import Extras, estimate
from kttrio.runner.memory import plan_memory
from kttrio.runner.needs import Needs
from kttrio.weights.checkpoint import INDEX, CheckpointError
from tests.machines import machine
from tests.published import published_file

LAYERS, EXPERTS = 48, 512
QUANTIZED = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "linear_attn.out_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
SHARDS = 8
GIB = 2**30


def gated_mlp(prefix, size):
    yield f"{prefix}gate_proj.weight", (size, 2048)
    yield f"{prefix}up_proj.weight", (size, 2048)
    yield f"{prefix}down_proj.weight", (2048, size)


def layer(prefix, *, full):
    yield f"{prefix}input_layernorm.weight", (2048,)
    yield f"{prefix}post_attention_layernorm.weight", (2048,)
    if full:
        yield f"{prefix}self_attn.q_proj.weight", (8192, 2048)
        yield f"{prefix}self_attn.k_proj.weight", (512, 2048)
        yield f"{prefix}self_attn.v_proj.weight", (512, 2048)
        yield f"{prefix}self_attn.o_proj.weight", (2048, 4096)
        yield f"{prefix}self_attn.q_norm.weight", (256,)
        yield f"{prefix}self_attn.k_norm.weight", (256,)
    else:
        yield f"{prefix}linear_attn.in_proj_qkvz.weight", (12288, 2048)
        yield f"{prefix}linear_attn.in_proj_ba.weight", (64, 2048)
        yield f"{prefix}linear_attn.conv1d.weight", (8192, 1, 4)
        yield f"{prefix}linear_attn.A_log", (32,)
        yield f"{prefix}linear_attn.dt_bias", (32,)
        yield f"{prefix}linear_attn.norm.weight", (128,)
        yield f"{prefix}linear_attn.out_proj.weight", (2048, 4096)
    yield f"{prefix}mlp.gate.weight", (EXPERTS, 2048)
    yield f"{prefix}mlp.shared_expert_gate.weight", (1, 2048)
    yield from gated_mlp(f"{prefix}mlp.shared_expert.", 512)
    for expert in range(EXPERTS):
        yield from gated_mlp(f"{prefix}mlp.experts.{expert}.", 512)


def body():
    """The 79.67 billion weights that compute."""
    yield "model.embed_tokens.weight", (151936, 2048)
    yield "model.norm.weight", (2048,)
    yield "lm_head.weight", (151936, 2048)
    for number in range(LAYERS):
        yield from layer(f"model.layers.{number}.", full=number % 4 == 3)


def prediction_head():
    yield "mtp.fc.weight", (2048, 4096)
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        yield f"mtp.{norm}.weight", (2048,)
    yield from layer("mtp.layers.0.", full=True)


def as_stored(tensors, *, fp8):
    """(name, dtype, bytes for each element, shape) of all that lies in the files."""
    for name, shape in tensors:
        if fp8 and name.removesuffix(".weight").endswith(QUANTIZED):
            yield name, "F8_E4M3", 1, shape
            yield f"{name}_scale_inv", "BF16", 2, tuple(-(-size // 128) for size in shape)
        else:
            yield name, "BF16", 2, shape


def write_holes(file, tensors):
    """A safetensors file of the right length whose weights take no room on the disk."""
    header, end = {}, 0
    for name, dtype, itemsize, shape in tensors:
        begin, end = end, end + itemsize * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)


@pytest.fixture(scope="module", params=[False, True], ids=["bf16", "fp8"])
def published(request, tmp_path_factory):
    directory, fp8 = tmp_path_factory.mktemp("published"), request.param
    tensors = list(as_stored([*body(), *prediction_head()], fp8=fp8))
    share, where = -(-len(tensors) // SHARDS), {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        part = tensors[number * share : (number + 1) * share]
        where |= {name: file for name, *_ in part}
        write_holes(directory / file, part)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    name = "Qwen3-Next-80B-A3B-FP8" if fp8 else "Qwen3-Next-80B-A3B"
    (directory / "config.json").symlink_to(published_file(name))
    return directory


@pytest.fixture(scope="module")
def measured(published):
    return estimate(published, dtype=torch.bfloat16, experts=ExpertConfig())


def test_the_shapes_are_those_of_the_published_model():
    assert sum(prod(shape) for _, shape in body()) == pytest.approx(79.67e9, rel=1e-4)


def test_a_published_checkpoint_is_accepted(published, measured):
    assert measured.shape == (151936, 2048, 262144, LAYERS, EXPERTS, 10, 0)
    assert stored_dtype(read_config(published)) is torch.bfloat16
    fp8 = measured.expert_format == "fp8"
    assert fp8 == ("quantization_config" in read_config(published))
    num_weights = LAYERS * EXPERTS * 3 * 512 * 2048
    scales = LAYERS * EXPERTS * 3 * 4 * 16 * 4
    assert measured.expert_bytes == (num_weights + scales if fp8 else 2 * num_weights)
    assert measured.dense_bytes == pytest.approx(4.73e9, rel=0.03)
    assert measured.cache_shape.bytes_per_token == 24576
    assert measured.cache_shape.bytes_per_slot == pytest.approx(77.3e6, rel=1e-3)


def test_its_prediction_layer_can_draft(published, measured):
    """Every tensor below `mtp.` is read, none is missing."""
    drafting = estimate(
        published, dtype=torch.bfloat16, experts=ExpertConfig(), extras=Extras(num_drafts=1)
    )
    more = drafting.expert_bytes - measured.expert_bytes
    assert more == measured.expert_bytes // LAYERS
    assert drafting.cache_shape.bytes_per_token == 24576 * 13 // 12
    projection, attention = 2 * 2048 * 2048, 2048 * (8192 + 512 + 512 + 4096)
    shared, gates = 3 * 512 * 2048, 513 * 2048
    dense = 2 * (projection + attention + shared) + 4 * gates
    assert drafting.dense_bytes - measured.dense_bytes == pytest.approx(dense, rel=1e-3)


def test_a_cache_of_256000_tokens_shortens_the_context(measured):
    def plan(**limits):
        engine = EngineConfig(max_total_tokens=256000, **limits)
        return plan_memory(Needs(measured, engine), machine(host=256 * GIB))

    assert plan().context_length == 256000
    with pytest.raises(
        ConfigError, match=r"needs a KV cache of 262144 tokens, but it holds 256000"
    ):
        plan(context_length=262144)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope type 'llama3'"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers must be empty"),
        ({"num_experts": 513}, "experts.512.gate_proj.weight' is missing|has shape"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(published, tmp_path, change, message):
    for file in published.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(read_config(published) | change))
    with pytest.raises(CheckpointError, match=message):
        estimate(tmp_path, dtype=torch.bfloat16, experts=ExpertConfig())
