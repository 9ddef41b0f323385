from __future__ import annotations

from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from kttrio.config import ConfigError
from kttrio.experts.convert import Job, choose_target, convert
from kttrio.experts.formats import check_experts
from kttrio.weights.checkpoint import Checkpoint, CheckpointError
from kttrio.weights.formats import base as formats
from kttrio.weights.loader import ExpertWeights
from kttrio.weights.quantize import Target


def layers(hidden=96, intermediate=64):
    return [
        ExpertWeights(
            *(f"l{layer}.{{}}.{name}" for name in ("g", "u", "d")), 3, hidden, intermediate
        )
        for layer in range(2)
    ]


def write_source(directory, maps, form="bf16"):
    module = formats.find(form)
    tensors = {}
    for weights in maps:
        for part in weights.all_parts():
            packed = module.quantize(torch.randn(part.shape), module.GROUPS[0])
            tensors[part.name] = packed.data
            if packed.scale is not None:
                tensors[part.name + module.COMPANION] = packed.scale
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture
def job(tmp_path):
    maps = layers()
    return Job(
        source=write_source(tmp_path / "source", maps),
        output=tmp_path / "output",
        target=choose_target("int4", None),
        maps=maps,
        threads=2,
        resume=False,
    )


def run(job):
    """What the person would see: (layer, error) and (bytes done, bytes in total)."""
    layers_done, bytes_done = [], []
    written = convert(
        job,
        progress=lambda done, total: bytes_done.append((done, total)),
        layer_done=lambda layer, error: layers_done.append((layer, round(error.relative, 6))),
    )
    return written, layers_done, bytes_done


@pytest.mark.parametrize("method", ["int4", "int8", "fp8"])
def test_the_output_holds_experts_of_the_method(job, method):
    written, layers_done, bytes_done = run(replace(job, target=choose_target(method, None)))
    with Checkpoint(job.output) as checkpoint:
        for weights in job.maps:
            form, groups = check_experts(checkpoint, weights)
            assert form == method
            assert choose_target(method, None).group in groups
        assert written == sum(entry.nbytes for entry in checkpoint.entries.values())
    assert [layer for layer, _ in layers_done] == [0, 1]
    low, high = {"int4": (0.08, 0.1), "int8": (0.005, 0.01), "fp8": (0.02, 0.03)}[method]
    assert all(low < error < high for _, error in layers_done)
    source_bytes = 2 * 3 * 3 * 96 * 64 * 2
    assert bytes_done[-1] == (source_bytes, source_bytes)


def test_the_number_of_threads_does_not_show(job, tmp_path):
    run(job)
    other = replace(job, output=tmp_path / "other", threads=1)
    run(other)
    for path in job.output.iterdir():
        assert path.read_bytes() == (other.output / path.name).read_bytes()


def test_fp8_sources_are_taken(job, tmp_path):
    source = write_source(tmp_path / "fp8", job.maps, "fp8")
    _, layers_done, _ = run(replace(job, source=source))
    assert len(layers_done) == 2


def test_resuming_does_what_is_missing_and_reports_all(job):
    _, first, _ = run(job)
    (job.output / "experts-00002-of-00002.safetensors").unlink()
    (job.output / "model.safetensors.index.json").unlink()
    _, again, bytes_done = run(replace(job, resume=True))
    assert again == first
    assert bytes_done[-1][1] == 3 * 3 * 96 * 64 * 2
    _, complete, nothing = run(replace(job, resume=True))
    assert complete == first
    assert nothing == []


def refuses(job, message, error=ConfigError):
    before = sorted(job.output.rglob("*")) if job.output.exists() else None
    with pytest.raises(error, match=message):
        run(job)
    assert (sorted(job.output.rglob("*")) if job.output.exists() else None) == before


def test_an_output_that_holds_something_is_refused(job):
    job.output.mkdir()
    (job.output / "thesis.txt").write_text("years of work")
    refuses(job, r"--output .*output is not empty; .* --resume")


def test_resuming_into_another_checkpoint_is_refused(job):
    refuses(replace(job, output=job.source, resume=True), "holds model.safetensors, .* another")


@pytest.mark.parametrize(
    "left", ["conversion.lock", "experts-00001-of-00002.safetensors.unfinished"]
)
def test_resuming_goes_on_from_the_least_that_a_kill_leaves(job, left):
    job.output.mkdir()
    (job.output / left).write_text("")
    _, done, _ = run(replace(job, resume=True))
    assert len(done) == 2


def test_an_output_that_is_a_file_is_refused(job):
    job.output.write_text("years of work")
    with pytest.raises(ConfigError, match="is no directory"):
        run(job)


def test_resuming_from_another_source_is_refused(job):
    run(job)
    write_source(job.source, job.maps)
    refuses(replace(job, resume=True), "made with another source", CheckpointError)


@pytest.mark.parametrize(
    ("form", "method", "message"),
    [
        ("int8", "int4", "the experts are int8 already; name the bf16 or fp8 checkpoint"),
        ("int4", "fp8", "the experts are int4 already"),
        ("fp8", "fp8", "the experts are fp8 already; it can be served as it is"),
    ],
)
def test_sources_that_cannot_gain_are_refused(job, form, method, message):
    write_source(job.source, job.maps, form)
    refuses(replace(job, target=choose_target(method, None)), message)


def test_sizes_the_kernels_cannot_take_are_refused(job):
    maps = layers(hidden=96, intermediate=40)
    write_source(job.source, maps)
    refuses(replace(job, maps=maps), "experts of 96 x 40 .* multiples of 32", CheckpointError)


def test_too_small_a_disk_is_refused(job, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    room = r"--output: .* needs 0.07 GB more, but its disk has 0.00 GB left; make room"
    with pytest.raises(ConfigError, match=room):
        run(job)
    assert not list(job.output.glob("experts-*"))
    monkeypatch.undo()
    run(job)  # nothing was begun that would have to be resumed


@pytest.mark.parametrize(
    ("method", "group", "target"),
    [
        ("int4", None, Target("int4", 64)),
        ("int4", 128, Target("int4", 128)),
        ("int8", None, Target("int8", 128)),
        ("fp8", None, Target("fp8", 128)),
    ],
)
def test_the_target(method, group, target):
    assert choose_target(method, group) == target


def test_fp8_takes_no_group_size():
    with pytest.raises(ConfigError, match="--group-size 64: fp8 has scales of its own"):
        choose_target("fp8", 64)
