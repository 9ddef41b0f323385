"""Which device is used, and why not: by what torch and Triton say of a GPU that is not here."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from kttrio.config import ConfigError
from kttrio.runner import device
from kttrio.runner.device import choose_kind, missing_for_cuda


class Gpu:
    """What is asked of torch; `wrong` is raised by the first operation."""

    def __init__(self, capability=(9, 0), *, version="13.0", is_there=True, wrong=None):
        self._wrong = wrong
        self.version = SimpleNamespace(cuda=version)
        self.cuda = SimpleNamespace(
            is_available=lambda: is_there, get_device_capability=lambda: capability
        )

    def ones(self, size, *, device):
        if self._wrong is not None:
            raise self._wrong
        return SimpleNamespace(item=lambda: 1.0)


@pytest.fixture
def gpu(monkeypatch):
    """Puts one there, with a Triton whose driver is `active`."""

    def put(found, *, has_triton=True, driver=None):
        monkeypatch.setattr(device, "torch", found)
        monkeypatch.setattr(device, "_has", lambda module: has_triton)
        monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=driver))

    return put


class Driver:
    @property
    def active(self):
        return SimpleNamespace(get_current_target=lambda: "sm_90")


class NoCompiler:
    @property
    def active(self):
        raise RuntimeError("Failed to find C compiler")


def test_a_gpu_that_computes_is_used(gpu):
    gpu(Gpu(), driver=Driver())
    assert missing_for_cuda() == ""
    assert choose_kind("auto", "") == choose_kind("cuda", "") == "cuda"


NO_IMAGE = RuntimeError("CUDA error: no kernel image is available\nFor debugging...")


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (Gpu(version=None), "built without CUDA"),
        (Gpu(is_there=False), "finds no GPU"),
        (Gpu((7, 5)), r"capability 7\.5, but 8\.0 is the least"),
        (Gpu(wrong=NO_IMAGE), r"\(CUDA error: no kernel image is available\); install"),
    ],
)
def test_what_a_gpu_lacks_is_told(gpu, found, why):
    gpu(found, driver=Driver())
    missing = missing_for_cuda()
    with pytest.raises(ConfigError, match=why):
        choose_kind("cuda", missing)
    assert choose_kind("auto", missing) == "none"


def test_what_triton_lacks_is_told(gpu):
    gpu(Gpu(), has_triton=False)
    assert "pip install triton" in missing_for_cuda()
    gpu(Gpu(), driver=NoCompiler())
    assert "(Failed to find C compiler); it needs gcc" in missing_for_cuda()
