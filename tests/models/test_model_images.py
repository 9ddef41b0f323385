"""Qwen3.5 with an image against transformers: pixels, tower, logits in any cut, drafts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from kttrio.config import EngineConfig, ExpertConfig, ModelConfig, RunnerConfig
from kttrio.engine.scheduler import Scheduler
from kttrio.layers.rotary import Rotation
from kttrio.models.base import read_config
from kttrio.models.loading import Extras, estimate, load_model
from kttrio.models.qwen3_5_moe import parse
from kttrio.plan import Chunk, StepPlan
from kttrio.request import FinishReason, GenerateRequest, SamplingParams
from kttrio.runner.build import build_runner
from kttrio.runner.images import Eyes
from kttrio.runner.tensors import StepBuilder
from kttrio.server.images import draw_image, open_image
from kttrio.text.images import ImageFormat
from kttrio.weights.checkpoint import CheckpointError
from tests.golden import FIXTURES, reference_model, tensors_of
from tests.models.mistakes import each_mistake
from tests.pictures import encode_image, image_input, source

DIRECTORY = FIXTURES / "qwen3_5_moe"
CPU = torch.device("cpu")
START, LENGTH = 6, 22
PAGE_SIZE, PAGES = 4, (5, 0, 3, 9, 1, 7, 2, 10, 4)
PARAMS = SamplingParams(max_tokens=12, seed=1, temperature=0.0)
CHUNKINGS = ((22,), (9, 13), (6, 2, 14), (7, 1, 1, 1, 1, 1, 10), (1,) * 22, (12, 10))
pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module")
def golden():
    return load_file(DIRECTORY / "golden_vision.safetensors")


@pytest.fixture(scope="module")
def picture(golden):
    """The golden image as a client sends it and the front hands it on."""
    form = ImageFormat.load(DIRECTORY, max_tokens=256)
    content = encode_image(Image.fromarray(golden["image"].numpy()))
    return draw_image(open_image(source(), content, form), START, form)


@pytest.fixture(scope="module")
def model():
    return reference_model(DIRECTORY)


def encoded(model, golden):
    _, rows, columns = golden["image_grid_thw"][0].tolist()
    return model.vision.encode(golden["pixel_values"], rows, columns)


def test_the_towers_features_are_the_golden_ones(model, golden):
    torch.testing.assert_close(encoded(model, golden), golden["features"], rtol=0, atol=2e-5)


def test_an_image_is_cut_into_the_golden_patches(model, golden, picture):
    """Resized, normalised and ordered as transformers does, from the file on."""
    pixels = []
    eyes = Eyes(lambda x: pixels.append(x) or torch.zeros(6, 64), device=CPU)
    eyes.look(built((picture,), golden["input_ids"].tolist(), 0, LENGTH))
    torch.testing.assert_close(model.vision._cut(pixels[0]), golden["pixel_values"])


def built(images, ids, start, end, *, slot=0):
    chunk = Chunk(slot, start, tuple(ids[start:end]), PAGES, PARAMS, False, end, images=images)
    return StepBuilder(page_size=PAGE_SIZE, device=CPU).build(StepPlan((chunk,)))


def logits(model, ids, images, chunks):
    """Of a prompt that passes in chunks, over caches of NaN."""
    caches = model.new_caches(num_pages=12, page_size=PAGE_SIZE, num_slots=2)
    for cache in caches:
        for tensor in tensors_of(cache):
            tensor.fill_(torch.nan)
    eyes, start, out = Eyes(model.vision, device=CPU), 0, []
    for chunk in chunks:
        step = eyes.look(built(images, ids, start, start + chunk, slot=1))
        out.append(model.logits(model(step.batch, caches)))
        start += chunk
    return torch.cat(out)


@pytest.mark.parametrize("chunks", CHUNKINGS, ids=lambda chunks: "+".join(map(str, chunks[:4])))
def test_any_cut_of_prompt_and_image_gives_the_golden_logits(model, golden, picture, chunks):
    found = logits(model, golden["input_ids"].tolist(), (picture,), chunks)
    torch.testing.assert_close(found, golden["logits"], rtol=0, atol=1e-3)


def test_bfloat16_follows_the_golden_run(golden, picture):
    model = load(dtype=torch.bfloat16)
    found = logits(model, golden["input_ids"].tolist(), (picture,), (9, 13))
    model.close()
    assert torch.cosine_similarity(found, golden["logits"]).median() > 0.99


def load(*, dtype=torch.float32, **extras):
    return load_model(
        DIRECTORY,
        dtype=dtype,
        experts=ExpertConfig(kt_cpuinfer=1),
        max_step_tokens=64,
        extras=Extras(**extras),
    )


# What is easily done the wrong way, and gives answers all the same.


def patches_row_by_row(tower):
    tower._places = lambda rows, columns: torch.cartesian_prod(
        torch.arange(rows), torch.arange(columns)
    )


def rows_and_columns_exchanged(tower):
    places = tower._places
    tower._places = lambda rows, columns: places(rows, columns).flip(1)


def no_learned_positions(tower):
    tower.table.zero_()


def learned_positions_of_the_nearest_place(tower):
    positions = tower._positions
    tower._positions = lambda places, rows, columns: positions(
        places, tower.shape.table_side, tower.shape.table_side
    )


def no_rotation(tower):
    tower._rotation = lambda places: Rotation(
        torch.ones(len(places), 1, 8), torch.zeros(len(places), 1, 8)
    )


def rotation_by_rows_alone(tower):
    rotation = tower._rotation
    tower._rotation = lambda places: rotation(places[:, :1].expand(-1, 2))


def exact_gelu_in_the_blocks(tower):
    for block in tower.blocks:
        block.forward = lambda x, rotation, b=block: (
            (y := x + b.attention(b.norm(x), rotation)) + b.down(F.gelu(b.up(b.mlp_norm(y))))
        )


def tanh_gelu_in_the_merger(tower):
    m = tower.merger
    m.forward = lambda x: m.down(F.gelu(m.up(m.norm(x).view(-1, m.size)), approximate="tanh"))


def no_norm_before_the_merger(tower):
    tower.merger.norm = nn.Identity()


def frames_averaged_instead_of_added(tower):
    tower.patches.weight.div_(tower.shape.frames)


@each_mistake(
    patches_row_by_row,
    rows_and_columns_exchanged,
    no_learned_positions,
    learned_positions_of_the_nearest_place,
    no_rotation,
    rotation_by_rows_alone,
    exact_gelu_in_the_blocks,
    tanh_gelu_in_the_merger,
    no_norm_before_the_merger,
    frames_averaged_instead_of_added,
)
def test_the_golden_features_notice_a_mistake(golden, mistake):
    model = reference_model(DIRECTORY)
    mistake(model.vision)
    assert (encoded(model, golden) - golden["features"]).abs().max() > 1e-4


@pytest.mark.parametrize("wrong", ["one axis", "square", "token count"])
def test_the_golden_logits_notice_wrong_positions(model, golden, picture, wrong, monkeypatch):
    """One axis: as text; square: columns as rows; token count: text goes on as if it were text."""
    true = golden["positions"]
    text = torch.arange(LENGTH).expand(3, -1)
    behind = torch.where(torch.arange(LENGTH) > START + 6, text, true)
    other = {"one axis": text, "square": true[[0, 2, 1]], "token count": behind}[wrong]
    monkeypatch.setattr(
        "kttrio.runner.tensors.rope_positions", lambda images, start, length: other.numpy()
    )
    found = logits(model, golden["input_ids"].tolist(), (picture,), (LENGTH,))
    assert (found - golden["logits"]).abs().max() > 3e-3


# Through the whole back wing.


def runner_and_scheduler(*, budget=64, num_pages=40, num_drafts=0):
    engine = EngineConfig(
        chunked_prefill_size=budget,
        max_running_requests=4,
        max_total_tokens=num_pages * PAGE_SIZE,
        context_length=48,
        page_size=PAGE_SIZE,
        speculative_algorithm="MTP" if num_drafts else None,
        speculative_num_draft_tokens=num_drafts or 1,
    )
    model = ModelConfig(model=DIRECTORY, dtype="float32")
    runner = build_runner(RunnerConfig(model, ExpertConfig(kt_cpuinfer=1), engine))
    return runner, Scheduler(runner.capacity, engine)


def answers(requests, **settings):
    runner, scheduler = runner_and_scheduler(**settings)
    sequences = [scheduler.submit(request) for request in requests]
    found = {sequence: [] for sequence in sequences}
    while (plan := scheduler.plan()) is not None:
        for sequence, event in scheduler.commit(plan, runner.step(plan)):
            assert event.finish is not FinishReason.ERROR, event.error
            found[sequence].append(event.token)
    runner.close()
    return SimpleNamespace(
        tokens=[found[sequence] for sequence in sequences], preemptions=scheduler.num_preemptions
    )


@pytest.fixture(scope="module")
def requests(golden, picture):
    """One with the image, one with text alone, one with two images of other sizes."""
    ids = golden["input_ids"].tolist()
    two = (image_input(2, 2, 4, token_side=8), image_input(12, 3, 1, token_side=8))
    chat = [*ids[:2], *[250] * 8, *ids[2:4], *[250] * 3, *ids[-6:]]
    asked = [(ids, (picture,)), (ids[-9:] + ids[:5], ()), (chat, two)]
    return [
        GenerateRequest(str(i), tuple(prompt), PARAMS, images)
        for i, (prompt, images) in enumerate(asked)
    ]


@pytest.fixture(scope="module")
def alone(requests):
    return [answers([request]).tokens[0] for request in requests]


def test_decoding_goes_on_behind_the_image(model, golden, picture, alone):
    """Each token drawn is what the whole sequence so far, as one prompt, would give."""
    ids = golden["input_ids"].tolist()
    for token in alone[0]:
        assert logits(model, ids, (picture,), (len(ids),))[-1].argmax() == token
        ids.append(token)


@pytest.mark.parametrize(
    ("settings", "preempted"),
    [
        ({}, False),
        ({"budget": 9}, False),
        ({"budget": 5, "num_pages": 13}, True),
        ({"num_drafts": 2}, False),
        ({"num_drafts": 1, "budget": 7}, False),
        ({"num_drafts": 2, "budget": 5, "num_pages": 13}, True),
    ],
    ids=["together", "cut", "preempted", "drafts", "drafts and cut", "drafts and preempted"],
)
def test_sequences_with_and_without_images_do_not_disturb_each_other(
    requests, alone, settings, preempted
):
    found = answers(requests, **settings)
    assert found.tokens == alone
    assert (found.preemptions > 0) is preempted


def test_another_image_gives_another_answer(requests, alone):
    with_image = requests[0]
    black = image_input(START, 2, 3, token_side=8, pixels=bytes(16 * 24 * 3))
    other = GenerateRequest("x", with_image.prompt_ids, PARAMS, (black,))
    assert answers([other]).tokens[0] != alone[0]


def test_the_towers_tensors_are_those_of_transformers():
    modeling = pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe")
    raw = read_config(DIRECTORY)["vision_config"]
    with torch.device("meta"):
        theirs = modeling.Qwen3_5MoeVisionModel(
            modeling.Qwen3_5MoeVisionConfig(**{**raw, "model_type": "qwen3_5_moe_vision"})
        )
    vision = parse(read_config(DIRECTORY)).vision
    ours = {part.name: part.shape for weight in vision.weights("") for part in weight.parts}
    named = theirs.named_parameters()
    assert ours == {f"model.visual.{name}": tuple(value.shape) for name, value in named}


# What is loaded, and what that takes.


def test_the_tower_is_left_out_where_it_is_not_wanted():
    blind = load(vision=False)
    assert blind.vision is None
    blind.close()
    guesses = [
        estimate(
            DIRECTORY,
            dtype=torch.float32,
            experts=ExpertConfig(),
            extras=Extras(vision=vision),
        )
        for vision in (True, False)
    ]
    tower = reference_model(DIRECTORY).vision
    saved = sum(parameter.nbytes for parameter in tower.parameters())
    assert guesses[0].dense_bytes - guesses[1].dense_bytes == saved
    assert guesses[0].image_token_bytes == tower.bytes_per_token
    assert guesses[1].image_token_bytes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 4}, "vision_config: in_channels 4 is not supported"),
        ({"hidden_act": "silu"}, "vision_config: hidden_act 'silu' is not supported"),
        ({"deepstack_visual_indexes": [1]}, "deepstack_visual_indexes must be empty"),
        ({"num_position_embeddings": 17}, "num_position_embeddings is 17, which makes no square"),
        ({"num_heads": 3}, "hidden_size 32 gives 3 heads no dimensions that part into pairs"),
        ({"out_hidden_size": 65}, "out_hidden_size 65 is not the hidden_size 64"),
        ({"patch_size": None}, "vision_config: patch_size is missing"),
    ],
)
def test_a_tower_that_would_be_misread_is_refused(change, message):
    raw = read_config(DIRECTORY)
    raw["vision_config"] |= change
    with pytest.raises(CheckpointError, match=message):
        parse(raw)


def test_a_language_model_that_knows_no_rows_and_columns_is_refused():
    raw = read_config(DIRECTORY)
    del raw["text_config"]["rope_parameters"]["mrope_section"]
    with pytest.raises(CheckpointError, match="mrope_section is missing"):
        parse(raw)
