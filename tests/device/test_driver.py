"""The calls into the CUDA driver, heard by a library that is none."""

from __future__ import annotations

from ctypes import c_void_p

import pytest

from kttrio.device import driver
from kttrio.device.driver import Driver, DriverError


class Function:
    """A C function as ctypes shows it, with a Python one behind it."""

    def __init__(self, behind):
        self._behind = behind
        self.argtypes = self.restype = None

    def __call__(self, *args):
        assert len(args) == len(self.argtypes)
        return self._behind(*args)


class FakeCuda:
    def __init__(self, result=0):
        self.calls = []
        self.cuLaunchHostFunc = Function(lambda *args: self.calls.append(args) or result)
        self.cuGetErrorName = Function(self._name)

    def _name(self, number, name):
        name._obj.value = {700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}.get(number)
        return 0


def test_a_host_function_is_launched_with_its_argument():
    library = FakeCuda()
    argument = c_void_p(3)
    Driver(library).launch_host_function(1, 2, argument)
    assert library.calls == [(1, 2, argument)]
    assert library.cuLaunchHostFunc.argtypes == (c_void_p, c_void_p, c_void_p)


@pytest.mark.parametrize(
    ("number", "told"), [(700, "CUDA_ERROR_ILLEGAL_ADDRESS"), (9999, "an unknown error")]
)
def test_what_the_driver_refuses_is_named(number, told):
    with pytest.raises(DriverError, match=rf"{told} \({number}\) from cuLaunchHostFunc"):
        Driver(FakeCuda(number)).launch_host_function(1, 2, c_void_p(3))


def test_without_a_driver_it_is_said(monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", "libno-such-driver.so")
    with pytest.raises(DriverError, match="cannot open the CUDA driver: libno-such-driver"):
        driver.open_driver()
