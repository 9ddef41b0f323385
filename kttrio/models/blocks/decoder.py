"""The decoder that every family here is: embedding, layers, final norm, head.

A family parses its config.json into a `DecoderSpec`; nothing below knows which family it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kttrio.experts.bank import Bank
from kttrio.experts.block import Experts, MoEBlock
from kttrio.experts.carry import Carry
from kttrio.experts.routing import Router
from kttrio.layers.backend import Backend
from kttrio.layers.batch import Batch
from kttrio.layers.cache import LayerCache, RecurrentCache
from kttrio.layers.embedding import Embedding
from kttrio.layers.linear import Linear
from kttrio.layers.norm import RMSNorm, one_plus
from kttrio.layers.rotary import extended_length
from kttrio.layers.step import Step
from kttrio.models.base import Activations, CacheShape, CausalLM, ModelShape, StepScratch
from kttrio.models.blocks.contract import LayerSpec, Mixer, Recurrent, Room
from kttrio.models.blocks.mtp import MTPSpec, PredictionLayer
from kttrio.models.blocks.vision import VisionSpec
from kttrio.weights.checkpoint import CheckpointError
from kttrio.weights.fields import Fields
from kttrio.weights.loader import ExpertWeights, Part, Weight, stack_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A `Blueprint`: what config.json says, in the terms of this folder."""

    vocab_size: int
    hidden_size: int
    context_length: int
    eps: float
    tied: bool
    layers: tuple[LayerSpec, ...]
    num_experts: int
    top_k: int
    centred_norms: bool = False
    """Norms are stored as their distance from one."""
    prefix: str = "model."
    """Of the stored names, the head's excepted."""
    left_out: tuple[str, ...] = ()
    """Prefixes of stored tensors that are not read; those of `mtp` are where it drafts."""
    mtp: MTPSpec | None = None
    """The layer that drafts come from, where the family has one."""
    num_drafts: int = 0
    """Drafts of a sequence in a step; 0: the layer is not read."""
    vision: VisionSpec | None = None
    """What sees images, where something does."""

    def __post_init__(self) -> None:
        if not any(layer.mlp.experts("") for layer in self.layers):
            raise CheckpointError("config.json: no layer has experts; dense models are not served")

    @classmethod
    def read(cls, fields: Fields, layers: tuple[LayerSpec, ...], router: Router) -> DecoderSpec:
        """What all families name alike."""
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            context_length=max(fields.integer("max_position_embeddings"), extended_length(fields)),
            eps=fields.number("rms_norm_eps"),
            tied=fields.boolean("tie_word_embeddings", False),
            layers=layers,
            num_experts=router.num_experts,
            top_k=router.top_k,
        )

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            context_length=self.context_length,
            num_layers=len(self.layers),
            num_experts=self.num_experts,
            top_k=self.top_k,
            num_drafts=self.num_drafts,
        )

    @property
    def skipped(self) -> tuple[str, ...]:
        left_out = self.left_out
        if self.drafts_from is not None:
            others = (prefix for prefix in left_out if prefix != self.drafts_from.prefix)
            left_out = (*others, *self.drafts_from.repeated)
        return (*left_out, "lm_head.") if self.tied else left_out

    @property
    def draft_weight(self) -> str | None:
        return f"{self.mtp.projection}.weight" if self.mtp else None

    def drafting(self, num_drafts: int) -> DecoderSpec:
        return replace(self, num_drafts=num_drafts)

    @property
    def drafts_from(self) -> MTPSpec | None:
        """The layer for drafts, where it is used."""
        return self.mtp if self.num_drafts else None

    def without_vision(self) -> DecoderSpec:
        if self.vision is None:
            return self
        return replace(self, vision=None, left_out=(*self.left_out, self.vision.prefix))

    def weight_map(self) -> Iterator[Weight]:
        vocab = (self.vocab_size, self.hidden_size)
        yield Weight("embedding.weight", (Part(f"{self.prefix}embed_tokens.weight", vocab),))
        yield self._norm("norm", f"{self.prefix}norm")
        if not self.tied:
            yield Weight("head.weight", (Part("lm_head.weight", vocab),))
        for number, layer in enumerate(self.layers):
            yield from self._layer(layer, f"layers.{number}.", self._stored(number))
        if self.drafts_from is not None:
            yield from self._prediction(self.drafts_from)
        if self.vision is not None:
            yield from self.vision.weights("vision.")

    def _layer(self, layer: LayerSpec, ours: str, theirs: str) -> Iterator[Weight]:
        yield self._norm(f"{ours}norm", f"{theirs}input_layernorm")
        yield self._norm(f"{ours}mlp_norm", f"{theirs}post_attention_layernorm")
        yield from layer.mixer.weights(f"{ours}mixer.", theirs)
        yield from layer.mlp.weights(f"{ours}mlp.", theirs)

    def _prediction(self, mtp: MTPSpec) -> Iterator[Weight]:
        yield self._norm("mtp.embedding_norm", mtp.embedding_norm)
        yield self._norm("mtp.hidden_norm", mtp.hidden_norm)
        joined = Part(f"{mtp.projection}.weight", (self.hidden_size, 2 * self.hidden_size))
        yield Weight("mtp.projection.weight", (joined,))
        yield from self._layer(mtp.layer, "mtp.layer.", mtp.block)
        yield self._norm("mtp.norm", mtp.norm)

    def expert_map(self) -> Iterator[ExpertWeights]:
        layers = [(layer, self._stored(number)) for number, layer in enumerate(self.layers)]
        if self.drafts_from is not None:
            layers.append((self.drafts_from.layer, self.drafts_from.block))
        for layer, theirs in layers:
            experts = layer.mlp.experts(theirs)
            if experts is not None:
                yield experts

    def build(self, bank: Bank, *, dtype: torch.dtype, backend: Backend = "torch") -> CausalLM:
        return Decoder(self, bank, dtype=dtype, backend=backend)

    def _stored(self, number: int) -> str:
        return f"{self.prefix}layers.{number}."

    def _norm(self, ours: str, theirs: str) -> Weight:
        part = Part(f"{theirs}.weight", (self.hidden_size,))
        return Weight(f"{ours}.weight", (part,), one_plus if self.centred_norms else stack_rows)


class Layer(nn.Module):
    """Mixer and MLP, each with a norm before it and a residual around it."""

    def __init__(
        self, layer: LayerSpec, spec: DecoderSpec, experts: Iterator[Experts], dtype: torch.dtype
    ) -> None:
        """Takes its own `experts`, if it has any: the next ones."""
        super().__init__()
        self.norm = RMSNorm(spec.hidden_size, eps=spec.eps)
        self.mixer = layer.mixer.build(dtype)
        self.mlp_norm = RMSNorm(spec.hidden_size, eps=spec.eps)
        has_experts = layer.mlp.experts("") is not None
        self.mlp = layer.mlp.build(dtype, next(experts) if has_experts else None)

    def forward(
        self, hidden: Tensor, step: Step, cache: LayerCache, carry: Carry | None = None
    ) -> Tensor:
        """hidden and result [tokens, hidden]; see `MoEBlock.forward` for the carry."""
        hidden = self.mix(hidden, step, cache)
        x = self.mlp_norm(hidden)
        if isinstance(self.mlp, MoEBlock):
            return hidden + self.mlp.forward(x, carry, step.batch.live)
        out: Tensor = hidden + self.mlp(x)
        return out

    def mix(self, hidden: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """The first half: mixer and residual."""
        out: Tensor = hidden + self.mixer(self.norm(hidden), step, cache)
        return out

    def feed(self, rows: Activations, *, piece: int, carry: Carry | None = None) -> Iterator[None]:
        """The second half, as `CausalLM.feed`."""
        for part in rows.pieces(piece):
            part.normed.copy_(self.mlp_norm(part.hidden))
            yield
        if isinstance(self.mlp, MoEBlock):
            yield from self.mlp.stream(rows.normed, rows.out, piece=piece, carry=carry)
        else:
            for part in rows.pieces(piece):
                part.out.copy_(self.mlp(part.normed))
                yield
        for part in rows.pieces(piece):
            part.hidden.add_(part.out)
            yield


class Decoder(CausalLM):
    def __init__(
        self, spec: DecoderSpec, bank: Bank, *, dtype: torch.dtype, backend: Backend
    ) -> None:
        super().__init__(spec.shape, bank)
        self.spec, self.dtype, self.backend = spec, dtype, backend
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size, dtype=dtype)
        experts = iter(bank.layers)
        self.layers = nn.ModuleList(Layer(layer, spec, experts, dtype) for layer in spec.layers)
        self.mtp = None
        if spec.drafts_from is not None:
            layer = Layer(spec.drafts_from.layer, spec, experts, dtype)
            self.mtp = PredictionLayer(spec.hidden_size, layer, eps=spec.eps, dtype=dtype)
        self.norm = RMSNorm(spec.hidden_size, eps=spec.eps)
        self.head = None
        if not spec.tied:
            self.head = Linear(spec.hidden_size, spec.vocab_size, dtype=dtype)
        if spec.vision is not None:
            self.vision = spec.vision.build(dtype)

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        step = self.new_step(batch)
        hidden = self.embed(batch)
        with Carry() as carry:
            for layer, cache in zip(self.layers, caches[: len(self.layers)], strict=True):
                hidden = layer(hidden, step, cache, carry)
        return self.finish(hidden)

    def new_step(self, batch: Batch) -> Step:
        return Step(batch, self.backend)

    def embed(self, batch: Batch) -> Tensor:
        hidden: Tensor = self.embedding(batch.token_ids)
        if batch.images is not None:
            hidden = hidden.index_copy(0, batch.images.rows, batch.images.features)
        return hidden

    def mix(self, layer: int, hidden: Tensor, step: Step, caches: list[LayerCache]) -> Tensor:
        return self._layer(layer).mix(hidden, step, caches[layer])

    def feed(
        self, layer: int, rows: Activations, *, piece: int, carry: Carry | None = None
    ) -> Iterator[None]:
        return self._layer(layer).feed(rows, piece=piece, carry=carry)

    def finish(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.norm(hidden)
        return out

    def new_activations(self, num_tokens: int) -> Activations:
        device = self.embedding.weight.device
        return Activations.new(num_tokens, self.hidden_size, dtype=self.dtype, device=device)

    def _layer(self, number: int) -> Layer:
        return cast("Layer", self.layers[number])

    def settle(self, lengths: Tensor, caches: list[LayerCache]) -> None:
        for layer, cache in zip(self.layers, caches[: len(self.layers)], strict=True):
            if isinstance(cache, RecurrentCache):
                cast("Recurrent", layer.mixer).settle(lengths, cache)

    def draft(self, batch: Batch, hidden: Tensor, caches: list[LayerCache]) -> Tensor:
        if self.mtp is None:
            raise ValueError("this model was loaded without its prediction layer")
        step = self.new_step(batch)
        out: Tensor = self.mtp(self.embed(batch), hidden, step, caches[-1])
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        if self.head is None:
            return F.linear(hidden, self.embedding.weight).float()
        out: Tensor = self.head(hidden)
        return out.float()

    def moe_blocks(self) -> Mapping[int, MoEBlock]:
        mlps = enumerate(layer.mlp for layer in self.layers)
        return {number: mlp for number, mlp in mlps if isinstance(mlp, MoEBlock)}

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    def cache_shape(self) -> CacheShape:
        shapes = [mixer.cache_shape(self.dtype) for mixer in self._mixers()]
        gathering = [s for s in shapes if self.backend == "torch" or not s.by_pages]
        return CacheShape(
            bytes_per_token=sum(shape.bytes_per_token for shape in shapes),
            bytes_per_slot=sum(shape.bytes_per_slot for shape in shapes),
            bytes_per_draft=sum(shape.bytes_per_draft for shape in shapes),
            bytes_gathered=max((shape.bytes_per_token for shape in gathering), default=0),
            bytes_chosen=max(shape.bytes_chosen for shape in shapes),
        )

    def step_scratch(self) -> StepScratch:
        each = (mixer.scratch(self.dtype, self.backend) for mixer in self._mixers())
        return reduce(StepScratch.widest, each)

    def new_caches(self, *, num_pages: int, page_size: int, num_slots: int) -> list[LayerCache]:
        device = self.embedding.weight.device
        room = Room(num_pages, page_size, num_slots, self.dtype, device)
        return [mixer.new_cache(room) for mixer in self._mixers()]

    def _mixers(self) -> list[Mixer]:
        """One for each cache: the layers', then the prediction layer's."""
        mtp = self.spec.drafts_from
        return [layer.mixer for layer in (*self.spec.layers, *([mtp.layer] if mtp else ()))]


def layers_after(fields: Fields, name: str) -> tuple[str, ...]:
    """Prefixes of what predicts further tokens, where it is stored as layers behind the last one;
    `name` is the field that counts them."""
    last = fields.integer("num_hidden_layers")
    return tuple(f"model.layers.{last + i}." for i in range(fields.count(name, 0)))


def check_quantization(config: Fields) -> None:
    """What is quantised shows in the tensors; here only schemes that would be misread."""
    fields = config.section("quantization_config")
    if fields.raw:
        method = fields.raw.get("quant_method")
        if method != "fp8":
            raise CheckpointError(
                f"{fields.where}: quant_method {method!r} is not supported, only 'fp8'; take the "
                "model's bf16 or fp8 checkpoint, with --kt-method int4 where memory is short"
            )
        if fields.raw.get("fmt") != "float8_e4m3fn":  # the same, as MiniMax spells it
            fields.demand("fmt", "e4m3", default="e4m3")
        fields.demand("weight_block_size", [128, 128])
