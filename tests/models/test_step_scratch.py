"""What a step takes beside its caches is what the memory plan has for it, at the widths of real
models: counted tensor by tensor while a few of their layers compute."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kttrio.models.base import find_family
from tests.batches import Run, make_batch
from tests.published import published_config

PAGE = 16
MLA = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-Coder-Next": {"num_hidden_layers": 4},
    "Qwen3-30B-A3B": {"num_hidden_layers": 1},
    "DeepSeek-V3": MLA,
    "DeepSeek-V3.2": MLA,
}


class Live(TorchDispatchMode):
    """Adds up the memory of tensors for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


class NoExperts:
    """An `ExpertBank` of layers that give nothing; what experts take has rows of its own."""

    isa, nbytes, num_threads, facts = "none", 0, 0, {}

    def __init__(self, num_layers: int) -> None:
        self.layers = [self] * num_layers

    def forward(self, x, routing, beside=None, carry=None):
        return torch.zeros_like(x) if beside is None else beside()

    def close(self) -> None:
        pass


def few_layers(name, backend):
    raw = published_config(name) | MODELS[name] | {"vocab_size": 64}
    blueprint = find_family(raw["model_type"]).parse(raw)
    bank = NoExperts(len(list(blueprint.expert_map())))
    model = blueprint.build(bank, dtype=torch.bfloat16, backend=backend).eval()
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    return model


def largest(model, num_tokens, start):
    """Bytes that live at once while a step of one sequence computes."""
    pages = tuple(range(-(-(start + num_tokens) // PAGE)))
    caches = model.new_caches(num_pages=len(pages), page_size=PAGE, num_slots=1)
    batch = make_batch([Run(0, start, (1,) * num_tokens, pages)], PAGE)
    with Live() as live:
        model(batch, caches)
    return live.peak


def planned(model, num_tokens, num_keys):
    row = num_tokens * model.hidden_size * 4
    scratch = model.step_scratch()
    layer = scratch.nbytes(num_tokens, context=num_keys, num_sequences=1)
    return 2 * row + max(6 * row, layer) + num_keys * model.cache_shape().bytes_gathered


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("num_tokens", "start"), [(256, 0), (1280, 0), (256, 4096)])
def test_a_step_takes_what_is_planned_for_it(name, num_tokens, start):
    model = few_layers(name, "torch")
    taken = largest(model, num_tokens, start)
    assert taken < planned(model, num_tokens, start + num_tokens)


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("name", MODELS)
def test_a_long_step_takes_little_less(name):
    model = few_layers(name, "torch")
    assert largest(model, 1280, 0) > 0.5 * planned(model, 1280, 1280)
