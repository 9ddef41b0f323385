"""Captured decode steps give what plain ones give, whatever sequences come, leave and grow."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from kttrio.config import (
    ConfigError,
    DeviceConfig,
    EngineConfig,
    ExpertConfig,
    ModelConfig,
    PlacementConfig,
    RecordingConfig,
    RunnerConfig,
)
from kttrio.device.cuda import CudaDevice
from kttrio.device.host import HostDevice
from kttrio.engine.scheduler import Scheduler
from kttrio.experts.division import Division
from kttrio.experts.slots import ExpertSlots
from kttrio.layers.batch import ImageRows, decode_batch
from kttrio.models.base import read_blueprint
from kttrio.models.loading import load_model
from kttrio.native import NativeError
from kttrio.plan import Capacity
from kttrio.request import GenerateRequest, SamplingParams
from kttrio.runner.build import load_runner
from kttrio.runner.device import find_machine
from kttrio.runner.graphs import DecodeGraphs, GraphRoom, GraphWish
from kttrio.runner.planning import plan_start
from kttrio.runner.runner import Runner
from tests.device.shuffled import ShuffledDevice
from tests.golden import FIXTURES, tensors_of

CHATS = sorted(file.parent for file in FIXTURES.glob("*_chat/golden.json"))
ENGINE = EngineConfig(
    chunked_prefill_size=16, max_running_requests=6, context_length=48, page_size=4
)
SIZES = (1, 4, 6)
PAGES = 12  # of a sequence
DEVICES = {
    "host": HostDevice,
    **{f"seed {seed}": lambda s=seed: ShuffledDevice(s) for seed in (1, 2)},
}


def test_sizes_are_powers_of_two_and_the_most_rows():
    assert GraphWish().fit(1) == (1,)
    assert GraphWish().fit(8) == (1, 2, 4, 8)
    assert GraphWish().fit(20) == (1, 2, 4, 8, 16, 20)
    assert GraphWish(most=6).fit(20) == (1, 2, 4, 6)
    assert GraphWish(most=64).fit(5) == (1, 2, 4, 5)


def test_wished_sizes_are_those_that_may_come():
    assert GraphWish((12, 3, 64, 3)).fit(20) == (3, 12)
    assert GraphWish((12, 3), most=4).fit(20) == (3,)
    assert GraphWish((64,)).fit(20) == ()


class Built:
    """A model whose experts are on both sides, alternately, and its caches, full of NaN."""

    def __init__(self, directory, device, *, backend="torch", **sides):
        blueprint = read_blueprint(directory)
        num_layers = sum(1 for _ in blueprint.expert_map())
        mask = torch.arange(num_layers * blueprint.shape.num_experts) % 2 == 0
        mask = mask.view(num_layers, -1)
        self.device = device
        self.model = load_model(
            directory,
            dtype=torch.float32,
            experts=ExpertConfig(kt_cpuinfer=1),
            max_step_tokens=ENGINE.chunked_prefill_size,
            division=Division(device, mask, **sides),
            backend=backend,
        )
        self.capacity = Capacity(
            num_slots=6,
            num_pages=6 * PAGES,
            page_size=4,
            context_length=48,
            max_step_tokens=16,
            vocab_size=self.model.vocab_size,
        )

    def runner(self, *, with_graphs, sizes=SIZES):
        caches = self.model.new_caches(
            num_pages=self.capacity.num_pages + 1,
            page_size=self.capacity.page_size,
            num_slots=self.capacity.num_slots + 1,
        )
        graphs = self.graphs(caches, sizes) if with_graphs else None
        where = self.device.where
        return Runner(
            self.model,
            caches,
            capacity=self.capacity,
            device=where,
            seam=self.device,
            graphs=graphs,
        )

    def graphs(self, caches, sizes):
        capacity = self.capacity
        room = GraphRoom(capacity.page_size, PAGES, capacity.num_pages, capacity.num_slots)
        return DecodeGraphs(self.model, caches, room=room, sizes=sizes, device=self.device)


@pytest.fixture(scope="module", params=CHATS, ids=lambda directory: directory.name)
def built(request):
    made = Built(request.param, HostDevice())
    yield made
    made.model.close()


@pytest.fixture(scope="module")
def one():
    made = Built(FIXTURES / "qwen3_next_chat", HostDevice())
    yield made
    made.model.close()


def requests(num_requests=9, vocab=50):
    """Of several lengths, so that they come and go one by one; some of a single token."""
    dice = random.Random(0)
    for number in range(num_requests):
        prompt = tuple(dice.choices(range(vocab), k=dice.choice((1, 5, 20))))
        sampling = SamplingParams(dice.randrange(3, 20), seed=number, temperature=0.7, logprobs=0)
        yield GenerateRequest(str(number), prompt, sampling)


def answer(runner, engine=ENGINE):
    """Tokens and log-probabilities of each request, and how many steps were only decodes."""
    scheduler, found, num_decodes = Scheduler(runner.capacity, engine), {}, 0
    for request in requests():
        scheduler.submit(request)
    while (plan := scheduler.plan()) is not None:
        result = runner.step(plan)
        num_decodes += all(len(chunk.token_ids) == 1 for chunk in plan.chunks)
        for chunk, own in zip(plan.chunks, result.chunks, strict=True):
            key = chunk.sampling.seed
            found.setdefault(key, []).extend(zip(own.tokens, own.logprobs, strict=True))
        scheduler.commit(plan, result)
    return found, num_decodes


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, drawn in expected.items():
        assert [token for token, _ in found[key]] == [token for token, _ in drawn]
        values = [[record.logprob for _, record in side] for side in (found[key], drawn)]
        torch.testing.assert_close(*map(torch.tensor, values), rtol=0, atol=1e-4)


def test_captured_steps_answer_as_plain_ones(built):
    expected, num_decodes = answer(built.runner(with_graphs=False))
    runner = built.runner(with_graphs=True)
    replays, real = [], runner.graphs.forward

    def counted(batch):
        hidden = real(batch)
        replays.append(hidden is not None)
        return hidden

    with patch.object(runner.graphs, "forward", counted):
        found, _ = answer(runner)
    check_equal(found, expected)
    assert sum(replays) == num_decodes > 10


@pytest.mark.parametrize("make", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("max_deferred", [0, 1])
def test_replays_keep_the_order_on_any_device(make, max_deferred):
    built = Built(FIXTURES / "qwen3_next_chat", make(), max_deferred=max_deferred)
    expected, _ = answer(built.runner(with_graphs=False))
    found, _ = answer(built.runner(with_graphs=True))
    check_equal(found, expected)
    built.model.close()


def test_padding_goes_to_no_expert(one):
    """Neither are experts computed for it, nor is it counted."""
    heard = []
    block = next(iter(one.model.moe_blocks().values()))
    block.listeners.append(lambda ids: heard.append(ids))
    runner = one.runner(with_graphs=True, sizes=(6,))
    block.listeners.clear()
    (ids,) = heard
    answer(runner)
    assert ids.shape[0] == 6
    live = (ids >= 0).any(1)
    assert live.any()
    assert not live.all(), "the last request is alone"
    assert (ids[~live] == -1).all()
    assert (ids[live] >= 0).all()


def test_other_batches_have_no_graph(one):
    graphs = one.runner(with_graphs=True).graphs
    plain = graphs._inputs.batch(4)
    assert graphs._size(plain) == 4
    assert graphs._size(replace(graphs._inputs.batch(5 - 1), num_decodes=3)) is None
    images = ImageRows(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1))
    assert graphs._size(replace(plain, images=images)) is None
    wide = torch.zeros(4, PAGES + 1, dtype=torch.int64)
    assert graphs._size(replace(plain, page_table=wide)) is None
    assert graphs.sizes == SIZES


def remember_something(caches):
    """The same in the same caches."""
    dice = torch.Generator().manual_seed(0)
    for cache in caches:
        for tensor in tensors_of(cache):
            tensor.normal_(generator=dice)


def test_text_after_images_stands_where_they_end():
    """Its places lag behind its positions, for each sequence by as much as its images are large."""
    built = Built(FIXTURES / "qwen3_5_moe_chat", HostDevice())
    pages = torch.arange(3 * PAGES).view(3, PAGES)
    positions = torch.tensor([9, 30, 2])
    text = decode_batch(torch.tensor([5, 6, 7]), positions, torch.arange(3), pages, page_size=4)
    lagging = replace(text, rope_positions=(positions - torch.tensor([3, 20, 0])).expand(3, -1))
    runners = [built.runner(with_graphs=graphs) for graphs in (True, False, False)]
    with torch.inference_mode():
        for runner in runners:
            remember_something(runner._caches)
        found = runners[0].graphs.forward(lagging)
        expected = built.model.forward(lagging, runners[1]._caches)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        other = built.model.forward(text, runners[2]._caches)
    assert (found - other).abs().amax(1).gt(1e-3).tolist() == [True, True, False]
    built.model.close()


def test_a_step_that_is_heard_is_not_replayed(one):
    class Ear:
        is_hearing = True

    runner = one.runner(with_graphs=True)
    runner.recorder = Ear()
    with patch.object(runner.graphs, "forward") as forward:
        runner._forward(runner.graphs._inputs.batch(1))
    forward.assert_not_called()


def test_what_goes_wrong_in_a_replays_host_work_fails_its_step_alone(one):
    runner = one.runner(with_graphs=True)
    expected, _ = answer(runner)
    host, slots = one.model.bank.host_layers[0], one.model.bank.sides.slots
    on_host = range(1, host.num_experts, 2)
    kept = [ExpertSlots(slots.shape, 1, device=torch.device("cpu")).slot(0) for _ in on_host]
    for expert, matrices in zip(on_host, kept, strict=True):
        matrices.unpack_from(host, expert)
        host.clear_expert(expert)
    for _ in range(2):
        with pytest.raises(NativeError, match="that expert has no weights"):
            answer(runner)
    for expert, matrices in zip(on_host, kept, strict=True):
        matrices.pack_into(host, expert)
    found, _ = answer(runner)
    check_equal(found, expected)


def planned(sizes, tmp_path, **placement):
    """A start whose plan is to capture steps, though the device is a CPU."""
    config = RunnerConfig(
        ModelConfig(model=FIXTURES / "qwen3_next_chat", dtype="float32"),
        ExpertConfig(kt_cpuinfer=1, kt_cache_dir=tmp_path),
        ENGINE,
        DeviceConfig(device="cpu"),
        placement=PlacementConfig(kt_gpu_experts_ratio=0.5, **placement),
        recording=RecordingConfig("stat", None, tmp_path),
    )
    start = plan_start(config, find_machine("cpu"))
    return replace(start, plan=replace(start.plan, graph_sizes=sizes))


def test_what_the_plan_says_is_captured(tmp_path):
    plain = load_runner(planned((), tmp_path), None)
    assert plain.graphs is None
    expected, _ = answer(plain)
    plain.close()
    captured = load_runner(planned((2, 5), tmp_path), None)
    assert captured.graphs.sizes == (2, 5)
    found, _ = answer(captured)
    check_equal(found, expected)
    captured.close()


@pytest.mark.parametrize("sizes", [(), (1, 2, 4, 6)], ids=["plain", "captured"])
def test_experts_follow_what_captured_steps_use(sizes, tmp_path):
    start = planned(sizes, tmp_path, kt_enable_dynamic_expert_update=True)
    runner = load_runner(start, None)
    expected, _ = answer(runner)
    for _ in range(3):
        found, _ = answer(runner)
        check_equal(found, expected)
    assert runner.updater.num_swaps
    runner.close()


def test_where_steps_cannot_be_captured_the_flag_that_helps_is_named(tmp_path):
    start = planned((1,), tmp_path)
    with (
        patch.object(HostDevice, "capture", side_effect=RuntimeError("no more memory")),
        pytest.raises(ConfigError, match="no more memory; --disable-cuda-graph"),
    ):
        load_runner(start, None)


GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("directory", CHATS, ids=lambda directory: directory.name)
@pytest.mark.parametrize(
    "handoff", [pytest.param(way, marks=GPU) for way in ("host-function", "flags")]
)
def test_on_a_gpu_captured_steps_answer_as_plain_ones(directory, handoff):
    built = Built(directory, CudaDevice(handoff=handoff), backend="triton")
    expected, _ = answer(built.runner(with_graphs=False))
    for _ in range(2):
        found, _ = answer(built.runner(with_graphs=True))
        check_equal(found, expected)
    built.model.close()
