"""What every model promises, and how one is found.

A family is a module of this folder, named like the `model_type` of its config.json; `Family` says
what the module must have. What the layers of a model are is known there and in `blocks/`; how one
is measured and loaded, in `loading.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn

import kttrio.models as package
from kttrio.experts.bank import Bank
from kttrio.experts.block import MoEBlock
from kttrio.experts.carry import Carry
from kttrio.layers.backend import Backend
from kttrio.layers.batch import Batch
from kttrio.layers.cache import LayerCache
from kttrio.layers.step import Step
from kttrio.layers.vision import VisionTower
from kttrio.weights.checkpoint import CheckpointError, read_json
from kttrio.weights.loader import ExpertWeights, Weight

NO_FAMILIES = ("base", "loading", "stored")


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What the memory plan needs to know of a model's caches."""

    bytes_per_token: int
    """Keys and values of all layers, in the model's dtype."""
    bytes_per_slot: int
    """Recurrent state and convolution history of all layers."""
    bytes_per_draft: int = 0
    """Kept of each token, of a sequence with drafts, until it is known which of them stand."""
    bytes_gathered: int = 0
    """Keys and values of a token in the layer that has most: attention copies them side by side."""
    by_pages: bool = False
    """Of a layer: kernels of attention, where there are some, read keys where they are."""
    bytes_chosen: int = 0
    """Which keys a token attends to, as one layer leaves it to the next; 0: nothing is left."""


class StepScratch(NamedTuple):
    """What a layer takes while a step passes through it, beside the step's own rows: bytes."""

    per_token: int = 0
    at_once: int = 0
    """For each of the tokens that the layer takes at a time."""
    num_at_once: int = 0
    """The most of them."""
    per_key: int = 0
    """For each key that may be seen, of whatever sequence."""
    of_keys: int = 0
    """The most that is taken for keys."""
    per_pair: int = 0
    """Of a token for each that it may see: masks."""

    def nbytes(self, num_tokens: int, *, context: int, num_sequences: int) -> int:
        """Of a step; each sequence is of `context` tokens at most."""
        of_tokens = num_tokens * (self.per_token + context * self.per_pair)
        of_keys = min(num_sequences * context * self.per_key, self.of_keys)
        return of_tokens + min(num_tokens, self.num_at_once) * self.at_once + of_keys

    def widest(self, other: StepScratch) -> StepScratch:
        """Room for either of two layers, of which one computes at a time."""
        return StepScratch(*map(max, self, other))


class ModelShape(NamedTuple):
    """The numbers that the outside may ask of any model."""

    vocab_size: int
    hidden_size: int
    context_length: int
    """Longest sequence the model was made for, in tokens."""
    num_layers: int
    num_experts: int
    top_k: int
    num_drafts: int = 0
    """Drafts of a sequence in a step, at most; 0: the model makes none."""


class Activations(NamedTuple):
    """Rows of a long prompt between two halves of a layer; each [tokens, hidden]."""

    hidden: Tensor
    """The residual stream, in the model's dtype."""
    normed: Tensor
    """The same, as an MLP takes it."""
    out: Tensor
    """What the MLP gives, in float32."""

    @classmethod
    def new(
        cls, num_tokens: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> Activations:
        """Zeros, written: the memory is there from now on."""
        shape = (num_tokens, hidden_size)
        kinds = (dtype, dtype, torch.float32)
        return cls(*(torch.empty(shape, dtype=kind, device=device).zero_() for kind in kinds))

    def pieces(self, size: int) -> Iterator[Activations]:
        """Views of so many rows each, or what is left."""
        parts = (torch.split(rows, size) for rows in self)
        return (Activations(*piece) for piece in zip(*parts, strict=True))

    def first(self, num_tokens: int) -> Activations:
        return Activations(*(rows[:num_tokens] for rows in self))


class CausalLM(nn.Module, ABC):
    """A model that predicts the next token.

    Owns its expert bank; `close` frees it. Not safe for calls from two threads at once.
    """

    def __init__(self, shape: ModelShape, bank: Bank) -> None:
        super().__init__()
        self.shape = shape
        self.bank = bank
        self.vision: VisionTower | None = None
        """What makes the rows of images for `Batch.images`; None: it takes no images."""

    @abstractmethod
    def new_caches(self, *, num_pages: int, page_size: int, num_slots: int) -> list[LayerCache]:
        """One cache per layer, on the model's device; the last is the prediction layer's, if it is
        there."""

    @abstractmethod
    def cache_shape(self) -> CacheShape: ...

    @abstractmethod
    def step_scratch(self) -> StepScratch:
        """Of the widest layer."""

    @abstractmethod
    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        """The last layer's output after the final norm: [tokens, hidden].

        After a batch with drafts `settle` must follow, before its sequences go on.
        """

    # The stages of `forward`, for prompts that pass layer by layer.

    @abstractmethod
    def embed(self, batch: Batch) -> Tensor:
        """What the first layer takes: [tokens, hidden]."""

    @abstractmethod
    def new_step(self, batch: Batch) -> Step:
        """What the layers share of one pass."""

    @abstractmethod
    def mix(self, layer: int, hidden: Tensor, step: Step, caches: list[LayerCache]) -> Tensor:
        """The first half of a layer, where tokens meet; hidden and result [tokens, hidden].

        A sequence's tokens come in order. `step` carries what a layer leaves to the next.
        """

    @abstractmethod
    def feed(
        self, layer: int, rows: Activations, *, piece: int, carry: Carry | None = None
    ) -> Iterator[None]:
        """The second half, of all rows of a long prompt: `rows.hidden` changes in place. One carry
        goes with the prompt through all layers.

        What is done row by row takes `piece` rows at a time. Other work may run where it yields.
        """

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm: what `forward` returns."""

    @abstractmethod
    def new_activations(self, num_tokens: int) -> Activations:
        """Room for a long prompt of so many tokens, on the model's device."""

    @abstractmethod
    def settle(self, lengths: Tensor, caches: list[LayerCache]) -> None:
        """Say how many tokens of each sequence with drafts stand, the known one included:
        lengths [sequences] int64, of those of the last batch that had drafts, in its order."""

    @abstractmethod
    def draft(self, batch: Batch, hidden: Tensor, caches: list[LayerCache]) -> Tensor:
        """Pass the tokens at positions p + 1 through the prediction layer: [tokens, hidden].

        The batch has positions p but the tokens one further; `hidden` are the rows of `forward`
        at p, or those of `draft` where they are not known yet. `logits` of the result are those
        of the tokens at p + 2. ValueError where the model was loaded without drafts.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] -> [n, vocab] float32"""

    @abstractmethod
    def moe_blocks(self) -> Mapping[int, MoEBlock]:
        """Where layers have experts, by the layer's number; not the prediction layer's."""

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.shape.hidden_size

    @property
    def context_length(self) -> int:
        return self.shape.context_length

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Of a token between two layers."""

    @property
    def num_layers(self) -> int:
        return self.shape.num_layers

    @property
    def num_experts(self) -> int:
        return self.shape.num_experts

    @property
    def top_k(self) -> int:
        return self.shape.top_k

    @property
    def dense_bytes(self) -> int:
        """Memory of everything but the routed experts."""
        return sum(parameter.nbytes for parameter in self.parameters())

    @property
    def expert_bytes(self) -> int:
        return self.bank.nbytes

    @property
    def isa(self) -> str:
        """Instruction set of the expert kernels."""
        return self.bank.isa

    @property
    def num_threads(self) -> int:
        """Worker threads of the experts."""
        return self.bank.num_threads

    def close(self) -> None:
        self.bank.close()


class Blueprint(Protocol):
    """A parsed config.json: what to read, and the empty model to read it into."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def skipped(self) -> tuple[str, ...]:
        """Prefixes of stored tensors that are left out knowingly."""
        ...

    def without_vision(self) -> Self:
        """The same model, reading text only."""
        ...

    @property
    def draft_weight(self) -> str | None:
        """A stored tensor without which there can be no drafts; None: the family makes none."""
        ...

    def drafting(self, num_drafts: int) -> Blueprint:
        """The same with its prediction layer, for so many drafts in a step."""
        ...

    def weight_map(self) -> Iterator[Weight]:
        """Every dense parameter."""
        ...

    def expert_map(self) -> Iterator[ExpertWeights]:
        """One entry per layer with routed experts, in order."""
        ...

    def build(self, bank: Bank, *, dtype: torch.dtype, backend: Backend = "torch") -> CausalLM:
        """The model, uninitialised; `backend` computes its attention."""
        ...


class Family(Protocol):
    """A module of this folder."""

    def parse(self, raw: dict[str, Any]) -> Blueprint:
        """Read config.json; CheckpointError for what is missing or unsupported."""
        ...


def model_types() -> list[str]:
    modules = (module.name for module in iter_modules(package.__path__) if not module.ispkg)
    return sorted(name for name in modules if name not in NO_FAMILIES)


def find_family(model_type: object) -> Family:
    """The module of that name; CheckpointError, with the known ones, when there is none."""
    known = model_types()
    if not model_type:
        raise CheckpointError("config.json: model_type is missing; is it a language model's?")
    if model_type not in known:
        raise CheckpointError(
            f"model_type {model_type!r} is not supported; known: {', '.join(known)}"
        )
    return cast("Family", import_module(f"{package.__name__}.{model_type}"))


def read_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's config.json; CheckpointError when there is no readable one."""
    return read_json(directory / "config.json")


def stored_dtype(raw: dict[str, Any]) -> torch.dtype:
    """The precision that config.json declares, in either spelling, for the whole or its text;
    bfloat16 where it is silent."""
    spoken = {**(raw.get("text_config") or {}), **raw}
    name = str(spoken.get("dtype") or spoken.get("torch_dtype") or "bfloat16")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"config.json: dtype {name!r} is not a float dtype")
    return dtype


def read_blueprint(directory: Path) -> Blueprint:
    """What the checkpoint's config.json describes; CheckpointError where no family knows it."""
    raw = read_config(directory)
    return find_family(raw.get("model_type")).parse(raw)
