"""Runs a model of any family as the runner would, beside the golden logits of its fixture; and
writes fixtures anew with something changed."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kttrio.layers.backend import Backend
from kttrio.models.base import CausalLM, read_blueprint
from kttrio.weights.checkpoint import Checkpoint
from kttrio.weights.loader import Countdown, fill
from tests.batches import Run, make_batch
from tests.reference import TorchBank

FIXTURES = Path(__file__).parent / "fixtures"
LENGTH = 41
PAGE_SIZE = 4
PAGES_PER_SEQUENCE = -(-LENGTH // PAGE_SIZE)


def load_golden(directory: Path) -> dict[str, Tensor]:
    """`input_ids` [tokens] and float32 `logits` [tokens, vocab]."""
    return load_file(directory / "golden.safetensors")


class Sequences:
    """Sequences that share caches full of NaN; each has scattered pages and a slot of its own."""

    def __init__(self, model, prompts, pages=PAGES_PER_SEQUENCE):
        self.model, self.prompts = model, prompts
        self.starts = [0] * len(prompts)
        num_pages = len(prompts) * pages + 1
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(3)).tolist()
        self.pages = [tuple(order[i * pages : (i + 1) * pages]) for i in range(len(prompts))]
        self.caches = model.new_caches(
            num_pages=num_pages, page_size=PAGE_SIZE, num_slots=len(prompts) + 2
        )
        for cache in self.caches:
            for tensor in tensors_of(cache):
                tensor.fill_(torch.nan)

    def slot(self, i: int) -> int:
        return len(self.prompts) + 1 - i

    def step(self, lengths):
        """Advance sequence i by lengths[i] tokens (0: not at all); logits of each one's tokens."""
        order = sorted(
            (i for i, length in enumerate(lengths) if length), key=lambda i: lengths[i] > 1
        )
        runs = []
        for i in order:
            begin, end = self.starts[i], self.starts[i] + lengths[i]
            pages = self.pages[i][: -(-end // PAGE_SIZE)]
            runs.append(Run(self.slot(i), begin, tuple(self.prompts[i][begin:end]), pages))
            self.starts[i] = end
        hidden = self.model(make_batch(runs, PAGE_SIZE), self.caches)
        parts = self.model.logits(hidden).split([lengths[i] for i in order])
        return dict(zip(order, parts, strict=True))


def tensors_of(cache) -> list[Tensor]:
    values = (getattr(cache, field.name) for field in fields(cache))
    return [value for value in values if isinstance(value, Tensor)]


def run_alone(model, prompt, chunks) -> Tensor:
    sequence = Sequences(model, [prompt])
    return torch.cat([sequence.step([chunk])[0] for chunk in chunks])


def reference_model(
    directory: Path, *, num_drafts: int = 0, backend: Backend = "torch"
) -> CausalLM:
    """Float32, its experts computed by torch: parameters may be changed to see what happens."""
    blueprint = read_blueprint(directory)
    if num_drafts:
        blueprint = blueprint.drafting(num_drafts)
    bank = TorchBank(directory, list(blueprint.expert_map()))
    model = blueprint.build(bank, dtype=torch.float32, backend=backend)
    with Checkpoint(directory) as source:
        fill(model, source, blueprint.weight_map(), Countdown(0, None))
    return model


def distance(model, golden) -> float:
    logits = run_alone(model, golden["input_ids"].tolist(), (20, 21))
    return float((logits - golden["logits"]).abs().max())


def mixers(model, kind):
    """The layers' mixers that are modules of a kind."""
    return [layer.mixer for layer in model.layers if isinstance(layer.mixer, kind)]


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a fixture, as stored."""
    shards = directory.glob("model*.safetensors")
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def write_checkpoint(directory: Path, raw, tensors) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    save_file(tensors, directory / "model.safetensors")
    return directory
