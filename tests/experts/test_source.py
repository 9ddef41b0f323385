from __future__ import annotations

from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kttrio.config import ConfigError, ExpertConfig
from kttrio.experts import source as module
from kttrio.experts.formats import plan_experts
from kttrio.experts.source import open_source
from kttrio.weights.checkpoint import INDEX, Checkpoint
from kttrio.weights.formats import base as formats
from kttrio.weights.loader import Countdown, ExpertWeights

MAPS = [
    ExpertWeights(*(f"l{layer}.{{}}.{name}" for name in ("g", "u", "d")), 3, 96, 64)
    for layer in range(3)
]


@pytest.fixture
def model(tmp_path):
    """Three layers in bf16, bf16 and fp8."""
    tensors = {}
    for number, weights in enumerate(MAPS):
        form = formats.find("fp8" if number == 2 else "bf16")
        for part in weights.all_parts():
            packed = form.quantize(torch.randn(part.shape), form.GROUPS[0])
            tensors[part.name] = packed.data
            if packed.scale is not None:
                tensors[part.name + form.COMPANION] = packed.scale
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


@contextmanager
def opened(model, cache, method):
    with Checkpoint(model) as checkpoint:
        plan = plan_experts(ExpertConfig(kt_method=method), checkpoint, MAPS, dtype=torch.float32)
        with open_source(plan, checkpoint, MAPS, cache_dir=cache, threads=2) as source:
            yield source, plan, checkpoint


def read_all(model, cache, method):
    """All experts, copied, after checking what the countdown hears."""
    heard, found = [], []
    with opened(model, cache, method) as (source, _, _):
        countdown = Countdown(source.nbytes, lambda done, total: heard.append((done, total)))
        for layer in range(len(MAPS)):
            for matrices in source.experts(layer, countdown):
                found.append([packed.data.clone() for packed in matrices])
                found.append([None if p.scale is None else p.scale.clone() for p in matrices])
    assert [done for done, _ in heard] == sorted({done for done, _ in heard})
    assert heard[-1][0] == heard[-1][1]
    assert len(found) == 2 * 3 * len(MAPS)
    return found


def expected(model, method):
    """The same, one matrix at a time."""
    found = []
    with opened(model, model, method) as (_, plan, checkpoint):
        for weights, held in zip(MAPS, plan.held, strict=True):
            for expert in range(weights.num_experts):
                packed = [pack(checkpoint, part.name, held) for part in weights.parts(expert)]
                found.append([one.data for one in packed])
                found.append([one.scale for one in packed])
    return found


def pack(checkpoint, name, held):
    stored = formats.stored_format(checkpoint, name)
    packed = formats.find(stored).load(checkpoint, name)
    if stored == held.form:
        return packed
    weight = formats.find(stored).dequantize(packed, torch.float32)
    return formats.find(held.form).quantize(weight, held.group)


def same(one, other):
    return all(
        (a is None and b is None) or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for ones, others in zip(one, other, strict=True)
        for a, b in zip(ones, others, strict=True)
    )


def count_work(monkeypatch):
    """How many matrices are quantised from now on."""
    made = []
    real = module.quantise_all

    def counted(checkpoint, parts, target, *, threads):
        for matrix in real(checkpoint, parts, target, threads=threads):
            made.append(matrix.part)
            yield matrix

    monkeypatch.setattr(module, "quantise_all", counted)
    return made


def test_as_stored(model, tmp_path):
    assert same(read_all(model, tmp_path / "cache", "auto"), expected(model, "auto"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("method", ["int4", "int8", "fp8"])
def test_quantised_once_and_mapped_afterwards(model, tmp_path, method, monkeypatch):
    made = count_work(monkeypatch)
    cache = tmp_path / "cache"
    wanted = expected(model, method)
    assert same(read_all(model, cache, method), wanted)
    changed = 2 if method == "fp8" else 3
    assert len(made) == changed * 9
    assert same(read_all(model, cache, method), wanted)
    assert len(made) == changed * 9
    (directory,) = cache.iterdir()
    assert directory.name.startswith(f"experts-{method}-")
    assert (directory / INDEX).exists()


def test_a_start_that_was_ended_goes_on(model, tmp_path, monkeypatch):
    made = count_work(monkeypatch)
    with opened(model, tmp_path / "cache", "int4") as (source, _, _):
        for _ in source.experts(0, Countdown(source.nbytes, None)):
            """Only the first layer."""
    assert len(made) == 9
    assert same(read_all(model, tmp_path / "cache", "int4"), expected(model, "int4"))
    assert len(made) == 27


def test_another_checkpoint_gets_a_cache_of_its_own(model, tmp_path):
    read_all(model, tmp_path / "cache", "int4")
    tensors = {part.name: torch.randn(part.shape) for m in MAPS for part in m.all_parts()}
    save_file(tensors, model / "model.safetensors")
    assert same(read_all(model, tmp_path / "cache", "int4"), expected(model, "int4"))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_without_room_it_goes_on_and_says_so(model, tmp_path, monkeypatch, caplog):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    assert same(read_all(model, tmp_path / "cache", "int4"), expected(model, "int4"))
    assert "quantised at every start" in caplog.text
    assert "its disk has" in caplog.text
    assert not list((tmp_path / "cache").glob("*/experts-*"))
    monkeypatch.undo()
    made = count_work(monkeypatch)  # where a lock was left this would wait for ever
    read_all(model, tmp_path / "cache", "int4")
    assert len(made) == 27


def test_a_cache_that_lacks_only_its_index_gets_it(model, tmp_path, monkeypatch):
    read_all(model, tmp_path / "cache", "int4")
    (index,) = (tmp_path / "cache").glob(f"*/{INDEX}")
    index.unlink()
    made = count_work(monkeypatch)
    read_all(model, tmp_path / "cache", "int4")
    assert index.exists()
    assert made == []


def test_where_nothing_may_be_written_it_goes_on_and_says_so(model, caplog):
    assert same(read_all(model, Path("/proc/no"), "int4"), expected(model, "int4"))
    assert "/proc/no" in caplog.text


def test_a_disk_that_fails_on_the_way_is_a_clear_error(model, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"No space left on device; .* --kt-cache-dir"):
        read_all(model, tmp_path / "cache", "int4")
