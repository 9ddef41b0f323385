"""The wall to the CUDA driver: what torch has no call for. Beside native.py the only ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_void_p
from typing import Any

LIBRARY = "libcuda.so.1"


class DriverError(RuntimeError):
    """The CUDA driver is absent or refused a call."""


class Driver:
    """Calls into the driver's current context, which torch makes on its first use of a GPU."""

    def __init__(self, library: Any) -> None:
        """`library` has the driver's C functions as attributes; see `open_driver`."""
        self._library = library
        library.cuLaunchHostFunc.argtypes = (c_void_p, c_void_p, c_void_p)
        library.cuLaunchHostFunc.restype = c_int
        library.cuGetErrorName.argtypes = (c_int, POINTER(c_char_p))
        library.cuGetErrorName.restype = c_int

    def launch_host_function(self, stream: int, function: int, argument: c_void_p) -> None:
        """Let a stream call function(argument) in a thread of the driver, once all before it has
        run; what follows waits for its return. All are addresses."""
        result = self._library.cuLaunchHostFunc(stream, function, argument)
        if result != 0:
            name = c_char_p()
            self._library.cuGetErrorName(result, byref(name))
            told = (name.value or b"an unknown error").decode()
            raise DriverError(f"{told} ({result}) from cuLaunchHostFunc")


def open_driver() -> Driver:
    """That of the system; DriverError where there is none."""
    try:
        return Driver(ctypes.CDLL(LIBRARY))
    except OSError as error:
        raise DriverError(f"cannot open the CUDA driver: {error}; install it") from error
