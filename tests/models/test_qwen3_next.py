from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kttrio.config import ExpertConfig
from kttrio.layers.cache import AttentionCache
from kttrio.models.base import load_model, read_config
from kttrio.models.qwen3_next import parse
from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.loader import Countdown, fill
from tests.batches import Run, make_batch
from tests.isas import EVERY_ISA
from tests.reference import TorchBank

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("qwen3_next", "qwen3_next_fp8")
LENGTH = 41
PAGE_SIZE = 4
PAGES_PER_SEQUENCE = -(-LENGTH // PAGE_SIZE)
CHUNKINGS = (
    (LENGTH,),
    (1,) * LENGTH,
    (13, 17, *(1,) * 11),
    (40, 1),
    (1, 40),
    (3, 1, 5, 32),
    (2, 2, 2, 35),
    (7,) * 5 + (6,),
)


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request):
    return FIXTURES / request.param


@pytest.fixture(scope="module")
def golden(checkpoint):
    return load_file(checkpoint / "golden.safetensors")


@pytest.fixture(scope="module", params=EVERY_ISA)
def model(request, checkpoint):
    model = load_model(
        checkpoint,
        dtype=torch.float32,
        experts=ExpertConfig(kt_cpuinfer=2, kt_isa=request.param),
        max_step_tokens=128,
    )
    assert model.isa == request.param
    yield model
    model.close()


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


class Sequences:
    """Sequences that share caches full of NaN; each has scattered pages and a slot of its own."""

    def __init__(self, model, prompts):
        self.model, self.prompts = model, prompts
        self.starts = [0] * len(prompts)
        num_pages = len(prompts) * PAGES_PER_SEQUENCE + 1
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(3)).tolist()
        self.pages = [
            tuple(order[i * PAGES_PER_SEQUENCE : (i + 1) * PAGES_PER_SEQUENCE])
            for i in range(len(prompts))
        ]
        self.caches = model.new_caches(
            num_pages=num_pages, page_size=PAGE_SIZE, num_slots=len(prompts) + 2
        )
        poison(self.caches)

    def step(self, lengths):
        """Advance sequence i by lengths[i] tokens (0: not at all); logits of each one's tokens."""
        order = sorted(
            (i for i, length in enumerate(lengths) if length), key=lambda i: lengths[i] > 1
        )
        runs = []
        for i in order:
            begin, end = self.starts[i], self.starts[i] + lengths[i]
            slot = len(self.prompts) + 1 - i
            pages = self.pages[i][: -(-end // PAGE_SIZE)]
            runs.append(Run(slot, begin, tuple(self.prompts[i][begin:end]), pages))
            self.starts[i] = end
        hidden = self.model(make_batch(runs, PAGE_SIZE), self.caches)
        parts = self.model.logits(hidden).split([lengths[i] for i in order])
        return dict(zip(order, parts, strict=True))


def poison(caches):
    for cache in caches:
        for tensor in (
            (cache.key, cache.value)
            if isinstance(cache, AttentionCache)
            else (cache.conv, cache.state)
        ):
            tensor.fill_(torch.nan)


def run_alone(model, prompt, chunks):
    sequence = Sequences(model, [prompt])
    return torch.cat([sequence.step([chunk])[0] for chunk in chunks])


def assert_close(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("chunks", CHUNKINGS, ids=lambda chunks: "+".join(map(str, chunks[:4])))
def test_any_chunking_gives_the_golden_logits(model, golden, chunks):
    prompt = golden["input_ids"].tolist()
    logits = run_alone(model, prompt, chunks)
    assert logits.dtype is torch.float32
    assert_close(logits, golden["logits"])


def test_a_ragged_batch_equals_single_sequences(model, golden):
    """Sequences of different lengths and chunkings, decoding and prefilling in the same steps."""
    first = golden["input_ids"].tolist()
    prompts = [first, first[5:30], first[::-1], first[2:5], first[7:8], first[10:40]]
    plan = [
        (13, 25, 1, 3, 1, 2),
        (1, 0, 20, 0, 0, 1),
        (17, 0, 1, 0, 0, 25),
        (1, 0, 1, 0, 0, 1),
        (9, 0, 18, 0, 0, 1),
    ]
    assert [sum(column) for column in zip(*plan, strict=True)] == list(map(len, prompts))
    together = Sequences(model, prompts)
    steps = [together.step(lengths) for lengths in plan]
    for i, prompt in enumerate(prompts):
        logits = torch.cat([step[i] for step in steps if i in step])
        assert_close(logits, run_alone(model, prompt, (len(prompt),)))
    assert_close(torch.cat([step[0] for step in steps]), golden["logits"])


def test_a_decode_batch_equals_single_sequences(model, golden):
    first = golden["input_ids"].tolist()
    prompts = [first[i : i + 4 + 3 * i] for i in range(8)]
    together = Sequences(model, prompts)
    lengths = [len(prompt) - 3 for prompt in prompts]
    together.step(lengths)
    decoded = [together.step([1] * 8) for _ in range(3)]
    for i, prompt in enumerate(prompts):
        logits = torch.cat([step[i] for step in decoded])
        assert_close(logits, run_alone(model, prompt, (len(prompt),))[-3:])


@pytest.mark.parametrize("chunks", [(LENGTH,), (1,) * LENGTH])
def test_a_lent_slot_and_pages_may_hold_anything(model, golden, chunks):
    """`Sequences` starts from NaN; here the garbage is another sequence's leftovers as well."""
    prompt = golden["input_ids"].tolist()
    sequence = Sequences(model, [prompt])
    sequence.prompts = [prompt[::-1]]
    sequence.step([LENGTH])
    sequence.prompts, sequence.starts = [prompt], [0]
    logits = torch.cat([sequence.step([chunk])[0] for chunk in chunks])
    assert torch.equal(logits, run_alone(model, prompt, chunks))


def test_a_sequence_is_not_disturbed_by_a_poisoned_neighbour(model, golden):
    """The slots and pages that a step does not name stay untouched and unread."""
    prompt = golden["input_ids"].tolist()
    pair = Sequences(model, [prompt, prompt])
    logits = torch.cat([pair.step([chunk, 0])[0] for chunk in (20, 1, 20)])
    assert_close(logits, golden["logits"])
    for cache in pair.caches:
        if isinstance(cache, AttentionCache):
            assert cache.key[list(pair.pages[1])].isnan().all()
        else:
            assert cache.state[2].isnan().all()


def test_bfloat16_follows_the_golden_run(checkpoint, golden):
    """Rounding flips near ties of the tiny random router: most positions must agree, not all."""
    model = load_model(
        checkpoint,
        dtype=torch.bfloat16,
        experts=ExpertConfig(kt_cpuinfer=1),
        max_step_tokens=16,
    )
    prompt = golden["input_ids"].tolist()
    logits = run_alone(model, prompt, (20, *(1,) * 21))
    model.close()
    similarity = torch.cosine_similarity(logits, golden["logits"])
    assert similarity.median() > 0.99


# Each of these is one thing that is easily got wrong; done wrong, the golden logits must notice.


def reference_model(checkpoint):
    config = parse(read_config(checkpoint))
    model = config.build(TorchBank(checkpoint, list(config.expert_map())), dtype=torch.float32)
    with Checkpoint(checkpoint) as source:
        fill(model, source, config.weight_map(), Countdown(0, None))
    return model


def distance(model, golden):
    logits = run_alone(model, golden["input_ids"].tolist(), (20, 21))
    return (logits - golden["logits"]).abs().max()


def test_the_reference_experts_agree_too(checkpoint, golden):
    assert distance(reference_model(checkpoint), golden) < 1e-3


def swap_queries_and_gates(model):
    """As if q_proj were not alternating head by head."""
    for layer, full in zip(model.layers, model.config.full_attention, strict=True):
        if full:
            rows = 2 * model.config.heads * model.config.head_dim
            weight = layer.mixer.in_proj.weight
            by_head = weight[:rows].view(2, model.config.heads, model.config.head_dim, -1)
            weight[:rows] = by_head.transpose(0, 1).reshape(rows, -1)


def norms_around_zero(model):
    """As if the norms were not zero-centred."""
    for layer in model.layers:
        layer.norm.weight -= 1


def delta_norm_around_one(model):
    """As if the gated norm were zero-centred like the others."""
    for layer, full in zip(model.layers, model.config.full_attention, strict=True):
        if not full:
            layer.mixer.norm.weight += 1


def rope_over_the_whole_head(model):
    model.rotary.__init__(model.config.head_dim, theta=model.config.rope_theta)


def convolution_backwards(model):
    for layer, full in zip(model.layers, model.config.full_attention, strict=True):
        if not full:
            layer.mixer.conv.copy_(layer.mixer.conv.flip(0))


def no_decay(model):
    for layer, full in zip(model.layers, model.config.full_attention, strict=True):
        if not full:
            layer.mixer.a_log.fill_(-torch.inf)


def shared_expert_without_gate(model):
    for layer in model.layers:
        layer.moe.gates[-1] = 0


def weights_not_renormalised(model):
    for layer in model.layers:
        layer.moe.renormalise = False


@pytest.mark.parametrize(
    "mistake",
    [
        swap_queries_and_gates,
        norms_around_zero,
        delta_norm_around_one,
        rope_over_the_whole_head,
        convolution_backwards,
        no_decay,
        shared_expert_without_gate,
        weights_not_renormalised,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_the_golden_logits_notice_a_mistake(golden, checkpoint, mistake):
    model = reference_model(checkpoint)
    mistake(model)
    assert distance(model, golden) > 1e-2


# The config in all its spellings.

FLAT = ("rope_theta", "partial_rotary_factor")


@pytest.fixture
def raw():
    return read_config(FIXTURES / "qwen3_next")


def flattened(raw):
    nested = raw.pop("rope_parameters")
    return raw | {name: nested[name] for name in FLAT} | {"rope_scaling": None}


def test_both_spellings_of_rope_mean_the_same(raw):
    nested = parse(raw)
    assert (nested.rope_theta, nested.rotary_dim) == (1e7, 8)
    assert parse(flattened(dict(raw))) == nested


def test_partial_rotary_factor_may_stand_outside(raw):
    nested = parse(raw)
    raw["partial_rotary_factor"] = raw["rope_parameters"].pop("partial_rotary_factor")
    assert parse(raw) == nested


def test_layers_come_from_a_list_or_an_interval(raw):
    listed = parse(raw)
    assert listed.full_attention == (False, False, False, True)
    del raw["layer_types"]
    assert parse(raw | {"full_attention_interval": 4}) == listed
    assert parse(raw | {"full_attention_interval": 2}).full_attention == (False, True) * 2


@pytest.mark.parametrize("name", FLAT)
def test_missing_rope_parameters_are_refused_never_guessed(raw, name):
    flat = flattened(raw)
    del flat[name]
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        parse(flat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers must be empty"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope type 'yarn' is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types must name 4 layers"),
        ({"layer_types": ["sliding"] * 4}, "layer_types must name 4 layers .* types sliding"),
        ({"num_experts": None}, "num_experts is missing"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok exceeds num_experts"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is not a whole number"),
        ({"hidden_size": "64"}, "hidden_size is '64', not a positive integer"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq' is not supported"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            r"weight_block_size \[64, 64\] is not supported",
        ),
        ({"partial_rotary_factor": 2.0, "rope_parameters": {"rope_theta": 1e4}}, "must be even"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(raw, change, message):
    with pytest.raises(CheckpointError, match=message):
        parse(raw | change)


def test_tied_embeddings_serve_as_head(tmp_path):
    """The same embedding twice: tied, and stored as a head of its own."""
    source = FIXTURES / "qwen3_next_fp8"
    raw = read_config(source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    logits = []
    for tied in (False, True):
        directory = tmp_path / str(tied)
        write_checkpoint(directory, raw | {"tie_word_embeddings": tied}, tensors)
        model = reference_model(directory)
        logits.append(run_alone(model, [5, 6, 7], (3,)))
    assert torch.equal(*logits)


def write_checkpoint(directory, raw, tensors):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    save_file(tensors, directory / "model.safetensors")


def test_cache_shape_counts_the_caches(model):
    caches = model.new_caches(num_pages=3, page_size=5, num_slots=7)
    pages = sum(c.key.nbytes + c.value.nbytes for c in caches if isinstance(c, AttentionCache))
    slots = sum(c.conv.nbytes + c.state.nbytes for c in caches if not isinstance(c, AttentionCache))
    shape = model.cache_shape()
    assert (shape.bytes_per_token * 15, shape.bytes_per_slot * 7) == (pages, slots)
