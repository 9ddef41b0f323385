"""Which device `--device` means, and what is said where it cannot be."""

from __future__ import annotations

import re

import pytest

from kttrio.config import ConfigError, DeviceConfig
from kttrio.device.host import HostDevice
from kttrio.runner import device
from kttrio.runner.device import choose_kind, find_machine, imagined_machine, open_device
from kttrio.runner.fitting import note_device

GIB = 2**30


@pytest.mark.parametrize(
    ("wanted", "missing", "kind"),
    [
        ("auto", "", "cuda"),
        ("auto", "a GPU", "none"),
        ("cpu", "", "cpu"),
        ("cpu", "a GPU", "cpu"),
        ("cuda", "", "cuda"),
    ],
)
def test_auto_takes_a_gpu_that_is_there_and_cpu_stands_in_for_one(wanted, missing, kind):
    assert choose_kind(wanted, missing) == kind


def test_a_gpu_that_is_asked_for_and_missing_is_refused_with_what_is_missing():
    with pytest.raises(ConfigError, match="--device cuda: no driver; --device auto takes the CPU"):
        choose_kind("cuda", "no driver")


@pytest.mark.parametrize(
    ("capability", "has_triton", "missing"),
    [
        ((8, 0), True, ""),
        ((12, 0), True, ""),
        ((7, 5), True, r"capability 7\.5, but 8\.0 is the least"),
        ((9, 0), False, "triton is missing"),
    ],
)
def test_a_gpu_must_be_new_enough_and_have_its_kernels(capability, has_triton, missing):
    found = device._missing_on_gpu(capability, has_triton=has_triton)
    assert re.search(missing, found)
    assert bool(found) == bool(missing)


def test_this_machine_has_one_memory_for_both_sides():
    found = find_machine("cpu")
    assert (found.kind, found.device_bytes, found.where.type) == ("cpu", None, "cpu")
    assert found.host_bytes > 0


def test_a_machine_may_be_imagined():
    bought = imagined_machine("auto", host_bytes=64 * GIB, device_bytes=24 * GIB)
    assert (bought.kind, bought.host_bytes, bought.fast_bfloat16) == ("cuda", 64 * GIB, True)
    assert bought.device_bytes == 24 * GIB - device.CONTEXT_BYTES
    assert imagined_machine("cpu", host_bytes=GIB, device_bytes=None).host_bytes == GIB
    with pytest.raises(ConfigError, match="--gpu-memory is a GPU's, but --device is cpu"):
        imagined_machine("cpu", host_bytes=None, device_bytes=GIB)


def test_only_a_device_is_opened():
    assert open_device("none") is None
    assert isinstance(open_device("cpu"), HostDevice)


@pytest.mark.parametrize(
    ("kind", "flags", "notes"),
    [
        ("none", {}, []),
        ("none", {"attention_backend": "torch"}, []),
        (
            "cpu",
            {"attention_backend": "triton", "cuda_graph_max_bs": 4, "disable_cuda_graph": True},
            [
                "without meaning here: --attention-backend (a CPU has one kernel for each layer)",
                "without meaning here: --disable-cuda-graph, --cuda-graph-max-bs (no CUDA graphs "
                "on a CPU)",
            ],
        ),
        ("cuda", {"attention_backend": "triton", "cuda_graph_bs": (1, 2)}, []),
        (
            "cuda",
            {"attention_backend": "flashinfer"},
            ["--attention-backend flashinfer is not here: triton takes its place"],
        ),
    ],
)
def test_flags_about_kernels_that_are_not_here_are_named(caplog, kind, flags, notes):
    note_device(DeviceConfig(**flags), kind)
    assert [record.message for record in caplog.records] == notes
