from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kttrio.weights.shard import UNFINISHED, Place, ShardWriter, shard_bytes, write_text

TENSORS = {
    "codes": torch.arange(12, dtype=torch.uint8).view(3, 4),
    "scales": torch.randn(3, 2).bfloat16(),
    "fp8": torch.randn(5, 7).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
}
LAYOUT = {name: Place(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def put_all(shard):
    for name in reversed(TENSORS):
        shard.put(name, TENSORS[name])


def test_others_read_what_is_written(tmp_path):
    path = tmp_path / "one.safetensors"
    with ShardWriter(path, LAYOUT, {"format": "pt"}) as shard:
        put_all(shard)
        assert not path.exists()
        shard.commit({"error": "0.25"})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "error": "0.25"}
    assert os.listdir(tmp_path) == [path.name]


def test_the_size_is_that_of_the_tensors():
    assert shard_bytes(LAYOUT) == sum(tensor.nbytes for tensor in TENSORS.values())


def test_nothing_is_left_of_a_shard_that_was_not_committed(tmp_path):
    with ShardWriter(tmp_path / "one", LAYOUT, {}) as shard:
        shard.put("codes", TENSORS["codes"])
        assert os.listdir(tmp_path) == [f"one{UNFINISHED}"]
    assert os.listdir(tmp_path) == []


def test_a_tensor_that_is_not_as_laid_out_is_refused(tmp_path):
    with ShardWriter(tmp_path / "one", LAYOUT, {}) as shard:
        with pytest.raises(ValueError, match=r"codes is torch\.uint8 .*not as laid out"):
            shard.put("codes", TENSORS["codes"][:2])
        with pytest.raises(ValueError, match=r"scales is torch\.float32"):
            shard.put("scales", TENSORS["scales"].float())


def test_a_shard_with_a_gap_is_not_committed(tmp_path):
    with ShardWriter(tmp_path / "one", LAYOUT, {}) as shard:
        shard.put("codes", TENSORS["codes"])
        with pytest.raises(ValueError, match="never put: empty, fp8, scales"):
            shard.commit({})


def test_a_full_disk_shows_before_the_work(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        ShardWriter(tmp_path / "one", LAYOUT, {})
    assert os.listdir(tmp_path) == []


def test_a_text_replaces_what_was_there(tmp_path):
    for text in ("one", "two"):
        write_text(tmp_path / "text", text)
    assert (tmp_path / "text").read_text() == "two"
    assert os.listdir(tmp_path) == ["text"]
