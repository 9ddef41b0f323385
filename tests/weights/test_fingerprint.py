from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from kttrio.weights.checkpoint import Checkpoint
from kttrio.weights.fingerprint import fingerprint


def write(directory, **changes):
    directory.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(256, 256, generator=generator) for name in ("a", "b")}
    save_file(tensors | changes, directory / "model.safetensors")
    return directory


def taken(directory):
    with Checkpoint(directory) as checkpoint:
        return fingerprint(checkpoint, ["a", "b"])


@pytest.fixture
def first(tmp_path):
    return write(tmp_path / "first")


def test_the_place_does_not_matter(first, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    assert taken(moved) == taken(first)
    assert len(taken(first)) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"b": torch.randn(256, 256)},  # another training state: headers and sizes are the same
        {"b": torch.randn(128, 512)},
        {"b": torch.randn(256, 512).bfloat16()},
        {"c": torch.zeros(1)},
    ],
)
def test_another_content_is_noticed(first, tmp_path, change):
    assert taken(write(tmp_path / "second", **change)) != taken(first)


def test_files_without_the_tensors_do_not_count(tmp_path):
    kept = tmp_path / "one.safetensors"
    other = tmp_path / "two.safetensors"
    save_file({"a": torch.zeros(3)}, kept)
    found = set()
    for value in (1.0, 2.0):
        save_file({"b": torch.full((3,), value)}, other)
        with Checkpoint(tmp_path, [kept, other]) as checkpoint:
            found.add(fingerprint(checkpoint, ["a"]))
    assert len(found) == 1
