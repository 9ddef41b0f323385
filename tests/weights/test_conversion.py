from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kttrio.weights.checkpoint import INDEX, Checkpoint, CheckpointError
from kttrio.weights.conversion import (
    LOCK,
    BusyError,
    Conversion,
    Identity,
    NoRoomError,
    is_unfinished,
)
from kttrio.weights.formats import base as formats
from kttrio.weights.loader import ExpertWeights, check_parts
from kttrio.weights.quantize import Target, quantise_all
from kttrio.weights.shard import UNFINISHED

IDENTITY = Identity("abc", Target("int4", 32))
LAYERS = [
    ExpertWeights(*(f"l{layer}.{{}}.{name}" for name in ("g", "u", "d")), 2, 64, 32)
    for layer in range(3)
]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    parts = [part for weights in LAYERS for part in weights.all_parts()]
    tensors = {part.name: torch.randn(part.shape).bfloat16() for part in parts}
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    with Checkpoint(tmp_path / "source") as checkpoint:
        yield checkpoint


@pytest.fixture
def output(tmp_path):
    return tmp_path / "some" / "output"


def write(conversion, source, layer):
    parts = LAYERS[layer].all_parts()
    conversion.write(layer, quantise_all(source, parts, IDENTITY.target, threads=1))


def write_all(output, source):
    with Conversion(output, IDENTITY, LAYERS) as conversion:
        for layer in conversion.missing:
            write(conversion, source, layer)
        conversion.finish()
        return conversion


def test_the_result_is_a_checkpoint(output, source):
    conversion = write_all(output, source)
    assert sorted(os.listdir(output)) == [
        *(f"experts-0000{layer}-of-00003.safetensors" for layer in (1, 2, 3)),
        INDEX,
    ]
    form = formats.find("int4")
    with Checkpoint(output) as made:
        for layer, weights in enumerate(LAYERS):
            check_parts(made, weights.all_parts())
            nbytes = 0
            for part in weights.all_parts():
                expected = form.quantize(source.read(part.name), 32)
                assert torch.equal(made.read(part.name), expected.data)
                assert torch.equal(made.read(part.name + "_scale"), expected.scale)
                nbytes += form.nbytes(part.shape, 32)
            assert conversion.layer_bytes(layer) == nbytes


def test_shards_and_index_say_what_they_are(output, source):
    conversion = write_all(output, source)
    index = json.loads((output / INDEX).read_text())["metadata"]
    assert index["total_size"] == sum(conversion.layer_bytes(layer) for layer in range(3))
    with safe_open(conversion.path(1), framework="pt") as file:
        shard = file.metadata()
    for found in (index, shard):
        assert (found["method"], found["group_size"], found["source"]) == ("int4", "32", "abc")
        assert found["kttrio"] == "1"
    assert shard["layer"] == "1"
    assert float(shard["relative_error"]) == pytest.approx(
        conversion.deviations[1].relative, abs=1e-5
    )


def test_another_run_goes_on_where_the_last_one_was(output, source):
    with Conversion(output, IDENTITY, LAYERS) as conversion:
        write(conversion, source, 0)
        write(conversion, source, 2)
        known = dict(conversion.deviations)
    assert is_unfinished(output)
    (output / f"experts-00002-of-00003.safetensors{UNFINISHED}").write_text("half a shard")
    with Conversion(output, IDENTITY, LAYERS) as conversion:
        assert conversion.missing == [1]
        assert conversion.deviations == known
        assert not list(output.glob(f"*{UNFINISHED}"))
        write(conversion, source, 1)
        conversion.finish()
    assert not is_unfinished(output)


def test_what_is_complete_is_only_looked_at(output, source):
    write_all(output, source)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    with Conversion(output, IDENTITY, LAYERS) as conversion:
        assert conversion.missing == []
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_a_shard_that_was_lost_is_made_again(output, source):
    conversion = write_all(output, source)
    content = conversion.path(1).read_bytes()
    conversion.path(1).unlink()
    with Conversion(output, IDENTITY, LAYERS) as conversion:
        assert conversion.missing == [1]
        write(conversion, source, 1)
        assert conversion.path(1).read_bytes() == content


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (Identity("other", IDENTITY.target), "made with another source: abc, not other"),
        (Identity("abc", Target("int8", 32)), "another method: int4, not int8"),
        (Identity("abc", Target("int4", 64)), "another group size: 32, not 64"),
    ],
)
def test_conversions_never_mix(output, source, identity, message):
    with Conversion(output, IDENTITY, LAYERS) as conversion:
        write(conversion, source, 0)
    with pytest.raises(CheckpointError, match=message):
        Conversion(output, identity, LAYERS)
    with Conversion(output, IDENTITY, LAYERS):
        """The refused one has not kept the lock."""


def test_shards_of_another_count_are_refused(output, source):
    with Conversion(output, IDENTITY, LAYERS) as conversion:
        write(conversion, source, 0)
    with pytest.raises(CheckpointError, match="another number of layers, not 2"):
        Conversion(output, IDENTITY, LAYERS[:2])


def test_a_broken_shard_is_named(output, source):
    with Conversion(output, IDENTITY, LAYERS) as conversion:
        write(conversion, source, 0)
        path = conversion.path(0)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"experts-00001-of-00003.* delete it"):
        Conversion(output, IDENTITY, LAYERS)


def test_a_layer_is_there_whole_or_not_at_all(output, source):
    def interrupted():
        yield next(quantise_all(source, LAYERS[0].all_parts(), IDENTITY.target, threads=1))
        raise KeyboardInterrupt

    with Conversion(output, IDENTITY, LAYERS) as conversion:
        with pytest.raises(KeyboardInterrupt):
            conversion.write(0, interrupted())
        assert conversion.missing == [0, 1, 2]
        assert os.listdir(output) == [LOCK]


def test_too_small_a_disk_is_said_first(output, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with Conversion(output, IDENTITY, LAYERS) as conversion:
        conversion.check_room()
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(
            NoRoomError, match=r"needs 0\.07 GB more, but its disk has 0\.00 GB left"
        ):
            conversion.check_room()


HOLD = """
import sys
from pathlib import Path
from tests.weights.test_conversion import IDENTITY, LAYERS, Conversion
with Conversion(Path(sys.argv[1]), IDENTITY, LAYERS):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(output):
    """Another process that is at it."""
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_processes_do_not_write_at_once(output, holder):
    with pytest.raises(BusyError, match=r"another process is writing into .*output"):
        Conversion(output, IDENTITY, LAYERS)
    holder.kill()
    holder.wait()
    with Conversion(output, IDENTITY, LAYERS) as conversion:
        assert conversion.missing == [0, 1, 2]


def test_one_may_wait_for_the_other(output, holder, caplog):
    threading.Timer(0.2, holder.kill).start()
    with Conversion(output, IDENTITY, LAYERS, wait=True) as conversion:
        assert conversion.missing == [0, 1, 2]
    assert "waiting for another process" in caplog.text
