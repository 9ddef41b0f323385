"""Whole models with experts on both sides: what they compute does not depend on who lives where."""

from __future__ import annotations

import json

import pytest
import torch

from kttrio.config import STRATEGIES
from tests.divided import divide, load_divided
from tests.golden import FIXTURES, LENGTH, PAGE_SIZE, Sequences, load_golden, run_alone

NEXT = FIXTURES / "qwen3_next"
FAMILIES = sorted(file.parent for file in FIXTURES.glob("*/golden.safetensors"))
CHATS = sorted(file.parent for file in FIXTURES.glob("*_chat/golden.json"))
CHUNKS = {"whole": (LENGTH,), "odd": (13, 1, 17, 1, 9), "single": (1,) * LENGTH}
ROOM = {"num_ring_slots": 4, "num_spare_slots": 1}

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def divided(request):
    """Loads models, and closes them."""
    models = []

    def load(directory, division, **options):
        models.append(load_divided(directory, division, **options))
        return models[-1]

    yield load
    for model in models:
        model.close()


def prompt_of(directory):
    return load_golden(directory)["input_ids"].tolist()


@pytest.mark.parametrize("ratio", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_placements_give_the_logits_of_transformers(divided, strategy, ratio):
    golden = load_golden(NEXT)
    model = divided(NEXT, divide(NEXT, ratio, strategy))
    for chunks in CHUNKS.values():
        logits = run_alone(model, prompt_of(NEXT), chunks)
        torch.testing.assert_close(logits, golden["logits"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("directory", FAMILIES, ids=lambda directory: directory.name)
def test_all_families_give_the_logits_of_transformers(divided, directory):
    golden = load_golden(directory)
    model = divided(directory, divide(directory, 0.5, "random", **ROOM))
    logits = run_alone(model, prompt_of(directory), (35, 1, 5))
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["bf16", "fp8", "int8", "int4"])
def test_all_formats_give_what_the_host_alone_gives(divided, tmp_path, method):
    flags = {"kt_method": method, "kt_cache_dir": tmp_path}
    whole = run_alone(divided(NEXT, None, **flags), prompt_of(NEXT), CHUNKS["odd"])
    model = divided(NEXT, divide(NEXT, 0.5, "random", **ROOM), **flags)
    for chunks in CHUNKS.values():
        logits = run_alone(model, prompt_of(NEXT), chunks)
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


def test_sequences_that_share_steps_do_not_meet(divided):
    prompt = prompt_of(NEXT)
    prompts = [prompt[i : i + 4 + 3 * i] for i in range(6)]
    model = divided(NEXT, divide(NEXT, 0.4, "frequency", **ROOM))
    together = Sequences(model, prompts)
    together.step([len(prompt) - 2 for prompt in prompts])
    decoded = [together.step([1] * len(prompts)) for _ in range(2)]
    for i, prompt in enumerate(prompts):
        logits = torch.cat([step[i] for step in decoded])
        alone = run_alone(model, prompt, (len(prompt),))[-2:]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


def greedy(model, case):
    """As many tokens as the answer has, after a prompt that comes in two pieces."""
    prompt, length = list(case["prompt_ids"]), len(case["answer_ids"])
    sequence = Sequences(model, [prompt], -(-(len(prompt) + length) // PAGE_SIZE))
    half = len(prompt) // 2
    sequence.step([half])
    logits = sequence.step([len(prompt) - half])[0]
    for _ in range(length):
        prompt.append(int(logits[-1].argmax()))
        logits = sequence.step([1])[0]
    return prompt[-length:]


@pytest.mark.parametrize("directory", CHATS, ids=lambda directory: directory.name)
def test_bfloat16_answers_are_those_of_transformers(divided, directory):
    division = divide(directory, 0.4, "frequency", **ROOM)
    model = divided(directory, division, dtype=torch.bfloat16, max_step_tokens=1024)
    for case in json.loads((directory / "golden.json").read_text())[:3]:
        assert greedy(model, case) == case["answer_ids"], case["name"]


def deferring(divided, num_deferred, **room):
    return divided(NEXT, divide(NEXT, 0.3, "random", max_deferred=num_deferred, **room))


def test_deferral_does_not_depend_on_how_a_prompt_is_cut(divided):
    model = deferring(divided, 2)
    whole = run_alone(model, prompt_of(NEXT), CHUNKS["whole"])
    for chunks in CHUNKS.values():
        logits = run_alone(model, prompt_of(NEXT), chunks)
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    other = run_alone(deferring(divided, 2, **ROOM), prompt_of(NEXT), CHUNKS["whole"])
    torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-4)


def test_deferral_changes_answers_where_an_expert_comes_late(divided):
    """So it is off unless asked for; with all experts on the device nothing can be late."""
    golden = load_golden(NEXT)["logits"]
    late = run_alone(deferring(divided, 2), prompt_of(NEXT), CHUNKS["whole"])
    assert not torch.allclose(late, golden, rtol=1e-3, atol=1e-3)
    resident = divided(NEXT, divide(NEXT, 1, max_deferred=2))
    logits = run_alone(resident, prompt_of(NEXT), CHUNKS["whole"])
    torch.testing.assert_close(logits, golden, rtol=1e-3, atol=1e-3)


def test_a_step_that_fails_leaves_nothing_to_the_next(divided):
    model = deferring(divided, 2)
    expected = run_alone(model, prompt_of(NEXT), CHUNKS["whole"])
    last = model.layers[-1].mlp.experts

    class Failing:
        def forward(self, *_):
            raise ArithmeticError("in the last layer")

    model.layers[-1].mlp.experts = Failing()
    with pytest.raises(ArithmeticError):
        run_alone(model, prompt_of(NEXT)[::-1], CHUNKS["whole"])
    model.layers[-1].mlp.experts = last
    assert torch.equal(run_alone(model, prompt_of(NEXT), CHUNKS["whole"]), expected)
