from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
import torch

from kttrio.config import ExpertConfig
from kttrio.experts.convert import Job, choose_target, convert
from kttrio.layers.deltanet import GatedDeltaNet
from kttrio.layers.rotary import Rope
from kttrio.models.base import read_config
from kttrio.models.blocks.deltanet import DeltaNetSpec
from kttrio.models.loading import WHOLE, Extras, estimate, load_model
from kttrio.models.qwen3_5_moe import parse
from kttrio.weights.checkpoint import CheckpointError
from tests.golden import (
    FIXTURES,
    mixers,
    read_tensors,
    run_alone,
    write_checkpoint,
)
from tests.models.mistakes import distance_after, each_mistake

STACKED = FIXTURES / "qwen3_5_moe"
NAMES = ("qwen3_5_moe", "qwen3_5_moe_fp8")
LAYERS = "model.language_model.layers."
pytestmark = pytest.mark.usefixtures("inference")


def projections_grouped_by_key_head(model):
    """As if their rows were stored like Qwen3-Next's."""
    for layer, spec in zip(model.layers, model.spec.layers, strict=True):
        if isinstance(spec.mixer, DeltaNetSpec):
            weight, heads = layer.mixer.in_proj.weight, spec.mixer.value_heads
            parts = weight.split([len(weight) - 2 * heads, 2 * heads])
            grouped, *_ = replace(spec.mixer, flat=False).weights("", "")
            weight.copy_(grouped.arrange(*parts))


def beta_and_decay_swapped(model):
    for mixer in mixers(model, GatedDeltaNet):
        rows = mixer.in_proj.weight[-2 * mixer.value_heads :]
        rows.copy_(rows.roll(mixer.value_heads, 0))


def up_rows_before_gate_rows(model):
    for layer in model.layers:
        experts = layer.mlp.experts
        experts.gate, experts.up = experts.up, experts.gate


@each_mistake(projections_grouped_by_key_head, beta_and_decay_swapped, up_rows_before_gate_rows)
@pytest.mark.parametrize("name", NAMES)
def test_the_golden_logits_notice_a_mistake(name, mistake):
    assert distance_after(mistake, FIXTURES / name) > 1e-2


@pytest.mark.parametrize("kind", ["A_log", "norm.weight"])
def test_what_is_stored_in_float32_is_not_rounded_in_a_bfloat16_model(tmp_path, kind):
    """Other servers round decay and gated norm; over a long sequence that adds up."""
    tensors, name = read_tensors(STACKED), f"{LAYERS}0.linear_attn.{kind}"
    exact = tensors[name] * 1.001
    assert exact.dtype is torch.float32
    assert not torch.equal(exact.bfloat16().float(), exact)
    directory = write_checkpoint(tmp_path, read_config(STACKED), tensors | {name: exact})
    model = load(directory, dtype=torch.bfloat16)
    mixer = model.layers[0].mixer
    assert torch.equal(mixer.a_log if kind == "A_log" else mixer.norm.weight, exact)
    model.close()


def load(directory, *, dtype=torch.float32, extras=WHOLE, **flags):
    experts = ExpertConfig(kt_cpuinfer=1, **flags)
    return load_model(directory, dtype=dtype, experts=experts, max_step_tokens=64, extras=extras)


def logits(directory, **flags):
    model = load(directory, **flags)
    out = run_alone(model, list(range(5, 30)), (20, *(1,) * 5))
    model.close()
    return out


def one_by_one(tensors):
    """Stacked experts as the FP8 checkpoints store theirs."""
    single = {}
    for name, tensor in tensors.items():
        prefix, stacked, kind = name.rpartition(".experts.")
        if not stacked:
            single[name] = tensor
            continue
        kinds = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
        for expert, matrices in enumerate(tensor):
            for one, matrix in zip(kinds, matrices.chunk(len(kinds)), strict=True):
                single[f"{prefix}.experts.{expert}.{one}.weight"] = matrix.clone()
    return single


@pytest.fixture
def single(tmp_path):
    """The stacked fixture with its experts stored one by one."""
    return write_checkpoint(
        tmp_path / "single", read_config(STACKED), one_by_one(read_tensors(STACKED))
    )


def test_experts_stacked_and_one_by_one_are_the_same_model(single):
    assert torch.equal(logits(STACKED), logits(single))
    config = ExpertConfig()
    guesses = [estimate(at, dtype=torch.float32, experts=config) for at in (STACKED, single)]
    assert guesses[0] == guesses[1]


@pytest.mark.parametrize("method", ["int4", "int8", "fp8"])
def test_stacked_experts_are_quantised_like_single_ones(tmp_path, single, method):
    """While loading, and before it."""
    job = Job(
        source=STACKED,
        output=tmp_path / "made",
        target=choose_target(method, None),
        maps=list(parse(read_config(STACKED)).expert_map()),
        threads=1,
        resume=False,
    )
    convert(job, progress=lambda *_: None, layer_done=lambda *_: None)
    before = logits(STACKED, kt_weight_path=job.output)
    for number, directory in enumerate((STACKED, single)):
        flags = {"kt_method": method, "kt_cache_dir": tmp_path / str(number)}
        assert torch.equal(logits(directory, **flags), before)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "gate_up_proj",
            lambda t: t[:, :48],
            r"experts\.0\.gate_proj\.weight' .* shape \[24, 64\]",
        ),
        ("gate_up_proj", lambda t: t[:, :63], r"experts\.0\.gate_proj\.weight' is missing"),
        ("down_proj", lambda t: t.transpose(1, 2), r"experts\.0\.down_proj.* shape \[32, 64\]"),
        ("down_proj", lambda t: t[:15], r"experts\.15\.down_proj\.weight' is missing"),
        ("down_proj", lambda t: t.repeat(2, 1, 1), r"experts\.16\.down_proj\.weight' .*unexpected"),
        ("gate_up_proj", lambda t: t[0], r"experts\.0\.gate_proj\.weight' is missing"),
    ],
)
def test_stacks_of_another_shape_are_refused(tmp_path, name, change, message):
    tensors = read_tensors(STACKED)
    stack = f"{LAYERS}2.mlp.experts.{name}"
    tensors[stack] = change(tensors[stack]).contiguous()
    directory = write_checkpoint(tmp_path, read_config(STACKED), tensors)
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_a_fused_shared_expert_is_refused_by_name(tmp_path):
    """Some quantisations of others store it so; nothing says which rows are which."""
    tensors = read_tensors(STACKED)
    name = f"{LAYERS}0.mlp.shared_expert.gate_up_proj.weight"
    tensors[name] = torch.zeros(64, 64)
    directory = write_checkpoint(tmp_path, read_config(STACKED), tensors)
    with pytest.raises(CheckpointError, match=r"shared_expert\.gate_up_proj\.weight' .*unexpected"):
        load(directory)


def test_a_checkpoint_of_text_alone_is_the_same_model(tmp_path):
    tensors = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in read_tensors(STACKED).items()
        if not name.startswith(("model.visual.", "mtp."))
    }
    alone = write_checkpoint(tmp_path, read_config(STACKED)["text_config"], tensors)
    assert torch.equal(logits(alone), logits(STACKED))


def test_what_is_left_out_is_told(caplog):
    with caplog.at_level(logging.INFO, "kttrio"):
        load(STACKED, extras=Extras(vision=False)).close()
    found = [message for message in caplog.messages if message.startswith("mtp.* is left out: ")]
    assert re.fullmatch(r"mtp.\* is left out: 0\.[1-9] MB that this model does not use", *found)
    assert any(message.startswith("model.visual.* is left out") for message in caplog.messages)


# The config in all its spellings.


@pytest.fixture
def raw():
    return read_config(STACKED)


def test_an_absent_norm_topk_prob_means_renormalised(raw):
    assert "norm_topk_prob" not in raw["text_config"]
    assert all(layer.mlp.router.renormalise for layer in parse(raw).layers)


def test_an_absent_attn_output_gate_means_gated(raw):
    gated = parse(raw)
    del raw["text_config"]["attn_output_gate"]
    assert gated.layers[3].mixer.gated
    assert parse(raw) == gated


def test_positions_of_images_keep_their_sections(raw):
    assert parse(raw).layers[3].mixer.rope == Rope(8, 1e7, sections=(2, 1, 1))


@pytest.mark.parametrize("tied", [True, False])
def test_whether_the_head_is_tied_stands_outside(raw, tied):
    raw["text_config"]["tie_word_embeddings"] = not tied
    assert parse(raw | {"tie_word_embeddings": tied}).tied is tied
    del raw["tie_word_embeddings"]
    assert parse(raw).tied is not tied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": None}, "text_config: rope_theta is missing"),
        ({"attn_output_gate": False}, "text_config: attn_output_gate False is not supported"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype 'bfloat16' is not supported"),
        ({"mlp_only_layers": [0]}, "text_config: mlp_only_layers must be empty"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(raw, change, message):
    raw["text_config"] |= change
    with pytest.raises(CheckpointError, match=message):
        parse(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mrope_interleaved": False}, "mrope_interleaved False is not supported"),
        ({"mrope_section": [2, 2, 1]}, r"mrope_section \[2, 2, 1\] does not share 4 frequencies"),
        ({"mrope_section": [2, 2]}, r"mrope_section \[2, 2\] does not share 4 frequencies"),
        ({"mrope_section": "2,1,1"}, "mrope_section is not a list of integers"),
    ],
)
def test_sections_that_would_be_misread_are_refused(raw, change, message):
    raw["text_config"]["rope_parameters"] |= change
    with pytest.raises(CheckpointError, match=message):
        parse(raw)


def test_a_config_without_its_text_is_refused(raw):
    del raw["text_config"]
    with pytest.raises(CheckpointError, match="text_config: head_dim is missing"):
        parse(raw)
