"""The prediction layer of every family against transformers, and drafts through whole models."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kttrio.cli.main import run as run_command
from kttrio.config import ConfigError, EngineConfig, ExpertConfig, ModelConfig, RunnerConfig
from kttrio.engine.scheduler import Scheduler
from kttrio.models.base import read_blueprint
from kttrio.models.loading import Extras, estimate, load_model
from kttrio.request import GenerateRequest, SamplingParams
from kttrio.runner.build import build_runner
from tests.batches import Run, make_batch
from tests.golden import FIXTURES, load_golden, reference_model, tensors_of

CHECKPOINTS = sorted(
    file.parent
    for file in FIXTURES.glob("*/golden.safetensors")
    if "mtp_logits" in load_golden(file.parent)
)
LENGTH, PAGE_SIZE = 40, 4
PAGES = tuple(random.Random(0).sample(range(12), 12))
EXPERTS = ExpertConfig(kt_cpuinfer=2)
pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=lambda directory: directory.name)
def checkpoint(request):
    return request.param


@pytest.fixture(scope="module")
def golden(checkpoint):
    return load_golden(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    model = load_model(
        checkpoint,
        dtype=torch.float32,
        experts=EXPERTS,
        max_step_tokens=64,
        extras=Extras(num_drafts=1),
    )
    yield model
    model.close()


def draft_logits(model, ids, chunks, *, shift=1, normed=True):
    """Of the tokens two positions on, for a prompt that passes in `chunks`, over caches of NaN."""
    caches = model.new_caches(num_pages=len(PAGES), page_size=PAGE_SIZE, num_slots=2)
    for cache in caches:
        for tensor in tensors_of(cache):
            tensor.fill_(torch.nan)
    before_norm = []
    hook = model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    out, start = [], 0
    for chunk in chunks:
        end = start + chunk
        batch, ahead = (
            make_batch([Run(1, start, tuple(ids[start + s : end + s]), PAGES)], PAGE_SIZE)
            for s in (0, shift)
        )
        hidden = model(batch, caches)
        fed = hidden if normed else before_norm[-1]
        out.append(model.logits(model.draft(ahead, fed, caches)))
        start = end
    hook.remove()
    return torch.cat(out)


def error_of(model, golden, **wrong):
    """The largest difference at each position."""
    logits = draft_logits(model, golden["input_ids"].tolist(), (LENGTH,), **wrong)
    return (logits - golden["mtp_logits"]).abs().amax(1)


@pytest.mark.parametrize("chunks", [(40,), (1,) * 40, (13, 1, 26), (3, 30, 7)])
def test_draft_logits_are_the_golden_ones(model, golden, chunks):
    """A gated norm before it amplifies rounding, as it does in the model's own logits."""
    logits = draft_logits(model, golden["input_ids"].tolist(), chunks)
    error = (logits - golden["mtp_logits"]).abs().amax(1)
    assert error.median() < 2e-4
    assert error.max() < 1e-3


def test_drafts_leave_the_logits_alone(model, golden):
    ids = golden["input_ids"]
    caches = model.new_caches(num_pages=len(PAGES), page_size=PAGE_SIZE, num_slots=2)
    hidden = model(make_batch([Run(0, 0, tuple(ids.tolist()), PAGES)], PAGE_SIZE), caches)
    torch.testing.assert_close(model.logits(hidden), golden["logits"], rtol=0, atol=1e-3)


def hidden_first(model):
    """As if the embedding were the second half of what is projected."""
    weight = model.mtp.projection.weight
    weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))


def norms_exchanged(model):
    mtp = model.mtp
    mtp.embedding_norm, mtp.hidden_norm = mtp.hidden_norm, mtp.embedding_norm


def no_final_norm(model):
    model.mtp.norm = nn.Identity()


@pytest.mark.parametrize("mistake", [hidden_first, norms_exchanged, no_final_norm])
def test_the_golden_draft_logits_notice_a_mistake(checkpoint, golden, mistake):
    model = reference_model(checkpoint, num_drafts=1)
    assert error_of(model, golden).median() < 2e-4
    mistake(model)
    assert error_of(model, golden).median() > 1e-2


@pytest.mark.parametrize(
    "wrong", [{"shift": 0}, {"normed": False}], ids=["token_of_the_same_place", "before_final_norm"]
)
def test_the_golden_draft_logits_notice_a_wrong_input(model, golden, wrong):
    assert error_of(model, golden, **wrong).median() > 1e-2


def test_the_memory_plan_hears_of_the_layer(checkpoint, model):
    plain = estimate(checkpoint, dtype=torch.float32, experts=EXPERTS)
    drafting = estimate(
        checkpoint, dtype=torch.float32, experts=EXPERTS, extras=Extras(num_drafts=3)
    )
    assert drafting.shape == plain.shape._replace(num_drafts=3)
    assert drafting.dense_bytes == model.dense_bytes > plain.dense_bytes
    assert drafting.expert_bytes > plain.expert_bytes
    caches = model.new_caches(num_pages=3, page_size=5, num_slots=7)
    shape = model.cache_shape()
    counted = 3 * 5 * shape.bytes_per_token + 7 * shape.bytes_per_slot
    assert counted == sum(tensor.nbytes for cache in caches for tensor in tensors_of(cache))
    assert shape.bytes_per_token > plain.cache_shape.bytes_per_token


def test_without_drafts_the_layer_is_left_out(checkpoint, golden):
    blueprint = read_blueprint(checkpoint)
    names = {part.name for weight in blueprint.weight_map() for part in weight.parts}
    assert blueprint.draft_weight not in names
    assert blueprint.draft_weight.startswith(blueprint.skipped)
    model = reference_model(checkpoint)
    with pytest.raises(ValueError, match="without its prediction layer"):
        draft_logits(model, golden["input_ids"].tolist(), (LENGTH,))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3_moe", "has no layer to draft with"),
        ("minimax_m2", "has no layer to draft with"),
        ("qwen3_next_fp8", r"'mtp\.fc\.weight' is missing; leave the flag out"),
    ],
)
def test_a_checkpoint_without_the_layer_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        estimate(FIXTURES / name, dtype=torch.float32, experts=EXPERTS, extras=Extras(num_drafts=1))


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_its_experts_are_quantised_like_the_others(tmp_path, caplog, method):
    """While loading, into a cache of its own, and by `kttrio quant`; both without and with it."""
    source, output = FIXTURES / "qwen3_next_chat", tmp_path / "converted"
    arguments = ["--input", str(source), "--output", str(output), "--method", method]
    assert run_command(["quant", *arguments]) == 0
    logits = []
    for num_drafts in (0, 1, 0, 1):
        for given in (
            {"kt_method": method, "kt_cache_dir": tmp_path / "cache"},
            {"kt_weight_path": output},
        ):
            model = load_model(
                source,
                dtype=torch.float32,
                experts=ExpertConfig(kt_cpuinfer=1, **given),
                max_step_tokens=64,
                extras=Extras(num_drafts=num_drafts),
            )
            if num_drafts:
                logits.append(draft_logits(model, list(range(41)), (LENGTH,)))
            model.close()
    assert all(torch.equal(found, logits[0]) for found in logits[1:])
    assert "was not made from" not in caplog.text


def test_it_may_be_bfloat16_in_an_fp8_checkpoint(tmp_path):
    source = FIXTURES / "qwen3_next_fp8"
    plain = read_blueprint(source)
    drafting = plain.drafting(1)
    known, parts = set(parts_of(plain)), parts_of(drafting)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        part.name: (
            torch.randn(part.shape, generator=generator) * part.shape[-1] ** -0.5
        ).bfloat16()
        for part in parts
        if part not in known
    }
    for file in source.iterdir():
        shutil.copy(file, tmp_path / file.name)
    save_file(tensors | load_file(source / "model.safetensors"), tmp_path / "model.safetensors")
    ids = load_golden(source)["input_ids"].tolist()
    model = load_model(
        tmp_path,
        dtype=torch.float32,
        experts=EXPERTS,
        max_step_tokens=64,
        extras=Extras(num_drafts=1),
    )
    reference = reference_model(tmp_path, num_drafts=1)
    found, expected = (draft_logits(each, ids, (LENGTH,)) for each in (model, reference))
    model.close()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def parts_of(blueprint):
    dense = (part for weight in blueprint.weight_map() for part in weight.parts)
    routed = (part for layer in blueprint.expert_map() for part in layer.all_parts())
    return [*dense, *routed]


# Whole models, with drafts that are right or wrong at random.


class Rigged:
    """Exchanges a runner's drafts for the known answer's tokens, one in `slips` of them wrong."""

    def __init__(self, runner, answers, slips):
        self.runner, self.answers, self.slips = runner, answers, slips
        self.chance = random.Random(7)
        self.accepted = []

    def step(self, plan):
        result = self.runner.step(plan)
        pairs = zip(plan.chunks, result.chunks, strict=True)
        return type(result)(tuple(self.exchanged(*pair) for pair in pairs), result.seconds)

    def exchanged(self, chunk, found):
        if chunk.num_drafts:
            self.accepted.append(len(found.tokens) - 1)
        answer = self.answers.get(chunk.sampling.seed)
        if not answer or not found.tokens:
            return found
        known = chunk.start + len(chunk.token_ids) - chunk.num_drafts + len(found.tokens)
        first = known - chunk.num_prompt_tokens
        drafts = answer[first : first + len(found.drafts)]
        return found._replace(drafts=tuple(t ^ self.chance.choice(self.errors) for t in drafts))

    @property
    def errors(self):
        return [1, *[0] * (self.slips - 1)]


def built(checkpoint, num_drafts=0, num_pages=40, dtype="float32"):
    engine = EngineConfig(
        chunked_prefill_size=12,
        max_running_requests=4,
        max_total_tokens=num_pages * PAGE_SIZE,
        page_size=PAGE_SIZE,
        speculative_algorithm="MTP" if num_drafts else None,
        speculative_num_draft_tokens=num_drafts or 1,
    )
    model = ModelConfig(model=checkpoint, dtype=dtype)
    return build_runner(RunnerConfig(model, EXPERTS, engine)), engine


def answers_of(runner, capacity, engine, requests):
    """Each request's tokens, by its seed."""
    scheduler = Scheduler(capacity, engine)
    heard = {scheduler.submit(request): [] for request in requests}
    while (plan := scheduler.plan()) is not None:
        for sequence, event in scheduler.commit(plan, runner.step(plan)):
            assert event.error is None
            heard[sequence].append(event.token)
    return {s.request.sampling.seed: tokens for s, tokens in heard.items()}, scheduler


def requests_of(golden):
    """Greedy and drawn ones, of different lengths; the second ends in the middle."""
    ids = golden["input_ids"].tolist()
    kinds = ({"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}, {"frequency_penalty": 1.0})
    return [
        GenerateRequest(
            str(i),
            tuple(ids[3 * i : 3 * i + 5 + 7 * (i % 3)]),
            SamplingParams(max_tokens=14 + 3 * i, seed=i, **kinds[i % 3]),
        )
        for i in range(6)
    ]


@pytest.fixture(scope="module")
def plain(checkpoint, golden):
    runner, engine = built(checkpoint)
    answers, _ = answers_of(runner, runner.capacity, engine, requests_of(golden))
    runner.close()
    return answers


@pytest.mark.parametrize(("num_drafts", "num_pages"), [(1, 40), (3, 40), (2, 14)])
def test_drafts_never_change_an_answer(checkpoint, golden, plain, num_drafts, num_pages):
    """Those of the layer itself, then better ones, that every number of them is accepted; among
    prompts in pieces and, in little room, preemptions."""
    runner, engine = built(checkpoint, num_drafts, num_pages)
    requests = requests_of(golden)
    own, _ = answers_of(runner, runner.capacity, engine, requests)
    rigged = Rigged(runner, plain, slips=4)
    helped, scheduler = answers_of(rigged, runner.capacity, engine, requests)
    runner.close()
    assert own == helped == plain
    assert set(rigged.accepted) == set(range(num_drafts + 1))
    assert scheduler.num_accepted > len(requests)
    assert (scheduler.num_preemptions > 0) == (num_pages == 14)


def test_the_facts_tell_of_drafts(checkpoint):
    runner, _ = built(checkpoint, 2)
    runner.close()
    assert runner.facts["drafts"] == "2 in a step, for each sequence"
    assert runner.capacity.num_drafts == 2


# Trained checkpoints, whose answers transformers gave in bfloat16.

CHATS = [
    file.parent
    for file in sorted(FIXTURES.glob("*_chat/golden.json"))
    if read_blueprint(file.parent).draft_weight
]


def chats_of(directory):
    """A greedy request for each chat, and the golden answers by their seeds."""
    chats = json.loads((directory / "golden.json").read_text())
    sampling = [SamplingParams(len(c["answer_ids"]), i, 0.0) for i, c in enumerate(chats)]
    requests = [
        GenerateRequest(chat["name"], tuple(chat["prompt_ids"]), params)
        for chat, params in zip(chats, sampling, strict=True)
    ]
    return requests, {i: chat["answer_ids"] for i, chat in enumerate(chats)}


@pytest.mark.parametrize("directory", CHATS, ids=lambda directory: directory.name)
def test_a_trained_model_answers_in_bfloat16_as_it_does_without_drafts(directory):
    requests, golden = chats_of(directory)
    runner, engine = built(directory, 3, num_pages=1000, dtype="bfloat16")
    own, _ = answers_of(runner, runner.capacity, engine, requests)
    rigged = Rigged(runner, golden, slips=4)
    helped, scheduler = answers_of(rigged, runner.capacity, engine, requests)
    runner.close()
    assert own == helped == golden
    assert set(rigged.accepted) == {0, 1, 2, 3}
    assert scheduler.num_accepted > sum(map(len, golden.values())) // 3
