"""A device whose memory is not the host's, without a GPU: tensors that say they are elsewhere.

Their values lie in the host's memory, so whole models run. But no operation takes them together
with tensors of the host, the native library does not take them, and what a GPU's host would have
to wait for is noted down.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from kttrio.device.host import HostDevice

_setup_privateuseone_for_python_backend("apart")
APART = torch.device("apart", 0)

_COPIES = frozenset(("copy_", "to", "_to_copy"))
_INDEXES = frozenset(("index", "index_put_", "_index_put_impl_"))
_WAITS = frozenset(
    ("_local_scalar_dense", "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero")
)


class ApartDevice(HostDevice):
    """The stand-in, with a memory of its own."""

    where = APART


class ApartTensor(Tensor):
    """`held` has the values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> ApartTensor:
        size = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made: ApartTensor = Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device=APART, **size
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _index(args[1], args[0].device), *args[2:])
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Call(func, args, kwargs or {}).run()


class Call:
    """An operation on tensors here and there."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name: str = func._schema.name.partition("::")[2]
        leaves = tree_leaves((args, kwargs))
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.ours = [tensor for tensor in self.tensors if isinstance(tensor, ApartTensor)]
        self.devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        self.is_apart = _is_apart(self.devices[0]) if self.devices else bool(self.ours)
        """Where its result is."""

    def run(self) -> Any:
        self._check()
        args, kwargs = tree_map(_on_host, (self.args, self.kwargs))
        return tree_map(self._wrapped, self.func(*args, **kwargs))

    @property
    def waits(self) -> bool:
        """A GPU's host would wait for all that is under way there."""
        if self.name in _COPIES:
            return self._moves and not self._argument("non_blocking")
        by_mask = self.name in _INDEXES and any(
            index is not None and index.dtype is torch.bool for index in self.args[1]
        )
        looks = self.name in _WAITS or self.name.startswith("_unique") or by_mask
        return looks and bool(self.ours)

    @property
    def _moves(self) -> bool:
        if self.name == "copy_":
            return len(self.ours) == 1
        return bool(self.devices) and self.is_apart != bool(self.ours)

    def _argument(self, name: str) -> Any:
        for place, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                positional = self.args[place] if place < len(self.args) else argument.default_value
                return self.kwargs.get(name, positional)
        return None

    def _check(self) -> None:
        """Only copies and indices may be of both sides, and numbers be anywhere."""
        tensors = self.tensors[:1] if self.name in _INDEXES else self.tensors
        here = [tensor for tensor in tensors if tensor.dim() and tensor.device.type == "cpu"]
        if self.ours and here and self.name not in _COPIES:
            raise RuntimeError(f"{self.name} takes tensors of the device and of the host")

    def _wrapped(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type == "meta":
            return value
        same = next((each for each in self.tensors if _on_host(each) is value), None)
        if same is not None and not (self._moves and self.name != "copy_"):
            return same
        if not self.is_apart:
            return value.clone() if same is not None else value
        with torch.inference_mode(False):  # made so, it could not be a view of one that is not
            return ApartTensor(value.clone() if same is not None else value)


class Watch(TorchDispatchMode):
    """Sees every operation of this thread; `waits` are those that a GPU's host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        call = Call(func, args, kwargs or {})
        if call.waits:
            self.waits.append(call.name)
        return call.run()


class _Making(TorchFunctionMode):
    """Python's values become tensors on the host first, as they do for every device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and _is_apart(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def watched() -> Iterator[Watch]:
    """Where tensors of this device may be made."""
    with _Making(), Watch() as watch:
        yield watch


def held_bytes() -> int:
    """Of the device's memory that somebody holds."""
    gc.collect()
    held = (each.held.untyped_storage() for each in gc.get_objects() if type(each) is ApartTensor)
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def _on_host(value: Any) -> Any:
    if isinstance(value, ApartTensor):
        return value.held
    return torch.device("cpu") if _is_apart(value) else value


def _is_apart(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("apart")


def _index(index: Any, device: torch.device) -> Any:
    """Lists become tensors on the device, for which the host waits."""
    if isinstance(index, tuple):
        return tuple(_index(each, device) for each in index)
    return torch.tensor(index).long().to(device) if isinstance(index, list) else index
