from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kttrio.config import ExpertConfig
from kttrio.layers.fp8_linear import Fp8Linear
from kttrio.models.base import read_blueprint
from kttrio.models.blocks.stored import keep_fp8
from kttrio.models.loading import estimate, estimate_config, load_model
from kttrio.weights.checkpoint import Checkpoint
from kttrio.weights.formats.base import stored_format
from kttrio.weights.loader import Countdown, fill
from tests.golden import FIXTURES, load_golden, reference_model, run_alone
from tests.reference import TorchBank

STORED = sorted(path.name for path in FIXTURES.glob("*_fp8"))
pytestmark = pytest.mark.usefixtures("inference")


def build(name, scheme="w8a16"):
    directory = FIXTURES / name
    blueprint = read_blueprint(directory)
    model = blueprint.build(TorchBank(directory, list(blueprint.expert_map())), dtype=torch.float32)
    weights = list(blueprint.weight_map())
    with Checkpoint(directory) as source:
        keep_fp8(model, weights, in_fp8(source), backend="torch", scheme=scheme)
        fill(model, source, weights, Countdown(0, None))
    return model


def in_fp8(source):
    return lambda part: stored_format(source, part.name) == "fp8"


def kept(model):
    return {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}


def logits(model, name):
    return run_alone(model, load_golden(FIXTURES / name)["input_ids"].tolist(), (20, 20, 1))


@pytest.mark.parametrize("name", STORED)
def test_matrices_that_stay_give_the_golden_logits(name):
    model = build(name)
    assert "layers.0.mixer.out_proj" in kept(model)
    golden = load_golden(FIXTURES / name)["logits"]
    torch.testing.assert_close(logits(model, name), golden, rtol=0, atol=1e-3)


def test_what_is_rearranged_or_ends_within_a_block_is_dequantised():
    """Gates are parted from queries; gate has 96 rows; the latent's `up` is absorbed."""
    assert kept(build("qwen3_next_fp8")) == {
        f"layers.{layer}.{path}"
        for layer in (0, 1)
        for path in ("mixer.out_proj", "mlp.shared.down")
    }
    assert not any(name.endswith("mixer.up") for name in kept(build("deepseek_v32_fp8")))


def test_memory_is_what_the_checkpoint_takes():
    plain, model = reference_model(FIXTURES / "qwen3_next_fp8"), build("qwen3_next_fp8")
    saved = 0
    for name in kept(model):
        weight, scale = model.get_submodule(name).weight, model.get_submodule(name).scale
        saved += 3 * weight.nbytes - scale.nbytes
    assert saved
    assert model.dense_bytes == plain.dense_bytes - saved


def test_rounded_activations_come_near():
    """Rounding to e4m3 must show; in a model of random weights some tokens change their experts."""
    name = "glm4_moe_fp8"
    golden, found = load_golden(FIXTURES / name)["logits"], logits(build(name, "w8a8"), name)
    assert 0.98 < F.cosine_similarity(found.flatten(), golden.flatten(), dim=0) < 0.9999


def test_loading_keeps_them_where_kernels_multiply():
    """The estimate of the dense weights says so too; without kernels they are widened."""
    directory, config = FIXTURES / "qwen3_next_fp8", ExpertConfig(kt_cpuinfer=1)
    arguments = {"dtype": torch.float32, "experts": config}
    for backend in ("torch", "triton"):
        model = load_model(directory, max_step_tokens=64, backend=backend, **arguments)
        assert bool(kept(model)) is (backend == "triton")
        dense_bytes = estimate(directory, backend=backend, **arguments).dense_bytes
        assert dense_bytes == model.dense_bytes
        model.close()


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_config_alone_tells_the_same(name, backend):
    directory = FIXTURES / name
    arguments = {"dtype": torch.bfloat16, "experts": ExpertConfig(), "backend": backend}
    stored = estimate(directory, **arguments)
    declared = estimate_config(directory / "config.json", **arguments)
    assert (declared.dense_bytes, declared.counts) == (stored.dense_bytes, stored.counts)
