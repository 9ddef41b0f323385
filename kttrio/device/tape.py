"""Torch operations, recorded as they run and run again on the same tensors.

What a CUDA graph does for a GPU, with its rules: Python runs once, so its values are baked in; and
whatever would make the host wait for a value on the device is refused. Only what torch dispatches
is seen: kernels that reach a tensor's memory by other ways run once and never again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# By their names, without namespace and overload.
_WAITING = frozenset(
    (
        *("_local_scalar_dense", "_pin_memory", "_unique", "_unique2", "bincount", "equal"),
        *("masked_select", "nonzero", "unique_consecutive", "unique_dim"),
    )
)
# Called from Python on tensors; most of them reach a CPU's memory without an operation.
_LOOKING = frozenset(
    (
        *("__array__", "__bool__", "__contains__", "__float__", "__index__", "__int__"),
        *("cpu", "item", "numpy", "tolist"),
    )
)
_MAKING = frozenset(("as_tensor", "asarray", "from_numpy", "frombuffer", "tensor"))


class Operation(NamedTuple):
    """One operation with all it was called with."""

    function: Any  # an overload of torch's
    args: tuple[object, ...]
    kwargs: dict[str, object]
    outs: tuple[Tensor, ...]
    """What it made: later operations read these, so running again fills them again."""

    def __call__(self) -> None:
        made = _new(self.function, self.function(*self.args, **self.kwargs))
        for kept, new in zip(self.outs, made, strict=True):
            kept.copy_(new)


class Operations:
    """A piece of work that was recorded, in its order."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = tuple(operations)

    def __len__(self) -> int:
        return len(self._operations)

    def __call__(self) -> None:
        with torch.inference_mode():  # which may write tensors of either kind
            for operation in self._operations:
                operation()


class Tape:
    """Records while it is open; `cut` gives what has run since the last one."""

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        self._modes.enter_context(_Refusing())
        self._modes.enter_context(_Recording(self._operations))
        return self

    def __exit__(self, *_: object) -> None:
        self._modes.close()

    def cut(self) -> Operations:
        operations = Operations(self._operations)
        self._operations.clear()
        return operations


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, operations: list[Operation]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations = operations

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        with self:  # in inference mode composite operations come here whole
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        _check(func, args, kwargs)
        made = func(*args, **kwargs)
        self._record(func, (args, kwargs), made)
        return made

    def _record(
        self, func: Any, called: tuple[tuple[object, ...], dict[str, object]], made: object
    ) -> None:
        outs = _new(func, made)
        if outs or func._schema.is_mutable:  # else a view, which stays what it is
            args, kwargs = tree_map(lambda value: value, called)  # lists may change later
            self._operations.append(Operation(func, args, kwargs, outs))


class _Refusing(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in _LOOKING or (name == "to" and _names_cpu(*args[1:], *kwargs.values())):
            raise _waits(name)
        if name in _MAKING:
            raise _is_baked_in(name)
        return func(*args, **kwargs)


def _names_cpu(*args: object) -> bool:
    """Said in so many words: the device of the stand-in is the same one."""
    return any(isinstance(arg, str) and arg == "cpu" for arg in args)


def _check(func: Any, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    """Raises where a GPU's host would have to wait, or a tensor would be made of Python values."""
    name = func._schema.name.partition("::")[2]
    by_mask = name.startswith(("index", "_index", "_unsafe_index")) and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        for index in (args[1] if isinstance(args[1], Sequence) else ())
    )
    by_counts = func._schema.overload_name == "Tensor" and kwargs.get("output_size") is None
    if name in _WAITING or by_mask or (name == "repeat_interleave" and by_counts):
        raise _waits(name)
    if name == "lift_fresh" and isinstance(args[0], Tensor) and args[0].dim():
        raise _is_baked_in("a list")


def _waits(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} waits for the device and lets the host look at a value; a captured step may not: "
        "keep the value in a tensor, or compute it before"
    )


def _is_baked_in(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} makes a tensor of Python values, which every replay would see again; a captured "
        "step may not: fill a tensor that outlives it before the replay"
    )


def _new(function: Any, made: object) -> tuple[Tensor, ...]:
    """Of what an operation gave, the tensors that are neither arguments nor views of them."""
    returns = function._schema.returns
    parts: Any = made if len(returns) > 1 else (made,)
    own = [part for part, kind in zip(parts, returns, strict=False) if kind.alias_info is None]
    return tuple(leaf for leaf in tree_leaves(own) if isinstance(leaf, Tensor))
