"""Torch operations that run again on the same tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kttrio.device.tape import Tape

X = torch.arange(12, dtype=torch.float32).view(3, 4) - 5


def record(work):
    with torch.inference_mode(), Tape() as tape:
        out = work()
        return out, tape.cut()


WORKS = {
    "functional": lambda x: x * 2 + 1,
    "composite": lambda x: F.linear(x, torch.ones(2, 4)),
    "view of an input": lambda x: x[1:].t(),
    "view of a result": lambda x: (x + 1).view(4, 3)[2],
    "reshape that copies": lambda x: x.t().reshape(12),
    "several results": lambda x: x.topk(2, dim=1).indices,
    "list of results": lambda x: torch.stack(torch.split(x.square(), 1)[::-1]),
    "in place": lambda x: torch.zeros(3, 4).add_(x).mul_(x),
    "out": lambda x: torch.index_select(x, 0, torch.arange(2), out=torch.empty(2, 4)),
    "index": lambda x: x[(x.sum(1) / 9).long().clamp(0, 2)],
    "setitem": lambda x: _set(torch.zeros(3, 4), x),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], -x[None]),
    "where": lambda x: torch.where(x > 0, x, 0.5),
    "conversion": lambda x: x.to(torch.bfloat16).float(),
    "conversion to the device": lambda x: x.to(x.device) + 1,
    "fixed number of repeats": lambda x: x.repeat_interleave(2, dim=0),
}


def _set(out, x):
    out[1] = 3
    out[0] = x[2]
    return out


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_a_replay_does_the_same_with_what_the_tensors_hold_by_then(work):
    x = X.clone()
    out, operations = record(lambda: work(x))
    assert torch.equal(out, work(X))
    for turn in range(2):
        x.copy_(X.flip(0) * (turn + 2))
        operations()
        assert torch.equal(out, work(X.flip(0) * (turn + 2)))


def test_python_runs_once_and_its_values_are_baked_in():
    factor, rows = 3, [0, 2]
    x, turns = X.clone(), []

    def work():
        turns.append(1)
        return torch.stack([x[row] for row in rows]) * factor

    out, operations = record(work)
    factor = 7
    rows.reverse()
    x.mul_(2)
    operations()
    assert torch.equal(out, X[[0, 2]] * 6)
    assert len(turns) == 1


def test_a_cut_begins_a_new_piece():
    x = torch.zeros(1)
    with Tape() as tape:
        x.add_(1)
        first = tape.cut()
        x.mul_(10)
        second = tape.cut()
    second()
    first()
    assert (len(first), len(second), x.item()) == (1, 1, 101)


def test_what_runs_outside_is_not_recorded():
    with Tape() as tape:
        X + 1
    X + 2
    assert len(tape.cut()) == 1


WAITING = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0]),
    "bool": lambda x: bool((x > 0).all()),
    "if": lambda x: 1 if (x > 0).any() else 2,
    "int": lambda x: int(x[0, 0]),
    "index": lambda x: [1, 2, 3][x[1, 1].long()],
    "in": lambda x: 3 in x,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "cpu": lambda x: x.cpu(),
    "to the cpu": lambda x: x.to("cpu"),
    "to the cpu, by name": lambda x: x.to(device="cpu", dtype=torch.float16),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "mask of rows": lambda x: x[(x > 0).all(1)],
    "set by mask": lambda x: x.clone().__setitem__(x > 0, 1),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.abs().long().flatten().bincount(minlength=9),
    "repeats": lambda x: x.repeat_interleave(torch.tensor_split(x, 1)[0][:, 0].abs().long(), dim=0),
    "equal": lambda x: torch.equal(x, x),
    "row of a tensor": lambda x: x[x[1, 1].long()],
}


@pytest.mark.parametrize("work", WAITING.values(), ids=WAITING)
def test_what_waits_for_the_device_is_refused(work):
    with pytest.raises(RuntimeError, match="lets the host look at a value"):
        record(lambda: work(X))


MAKING = {
    "tensor": lambda: torch.tensor(3.0),
    "list": lambda: torch.tensor([1, 2]),
    "index": lambda: X[[0, 2]],
    "as_tensor": lambda: torch.as_tensor([1.0]),
    "from_numpy": lambda: torch.from_numpy(np.zeros(3)),
    "asarray": lambda: torch.asarray([1.0]),
}


@pytest.mark.parametrize("work", MAKING.values(), ids=MAKING)
def test_tensors_of_python_values_are_refused(work):
    with pytest.raises(RuntimeError, match="of Python values"):
        record(work)
