"""Qwen3-Next: three gated DeltaNet layers, then one of gated full attention; all of them MoE.

Sources: the published config.json and tensor names of Qwen3-Next-80B-A3B and Qwen3-Coder-Next.
Its multi-token-prediction head (`mtp.*`) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kttrio.experts.bank import Bank
from kttrio.experts.block import MoEBlock
from kttrio.layers.attention import GatedAttention, KeyIndex, index_keys
from kttrio.layers.batch import Batch
from kttrio.layers.cache import AttentionCache, LayerCache, RecurrentCache
from kttrio.layers.deltanet import GatedDeltaNet, RunIndex, index_runs
from kttrio.layers.embedding import Embedding
from kttrio.layers.linear import Linear
from kttrio.layers.norm import RMSNorm, one_plus
from kttrio.layers.rotary import Rotary, Rotation, read_rope
from kttrio.models.base import CacheShape, CausalLM, ModelShape
from kttrio.weights.checkpoint import CheckpointError
from kttrio.weights.fields import Fields
from kttrio.weights.loader import ExpertWeights, Part, Weight


@dataclass(frozen=True, slots=True)
class Config:
    """The fields of config.json that matter here; names as published where they are clear."""

    vocab_size: int
    hidden_size: int
    full_attention: tuple[bool, ...]  # of each layer
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    expert_size: int
    shared_size: int
    tied: bool

    @property
    def channels(self) -> int:
        """Inputs of the short convolution."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            context_length=self.max_position_embeddings,
            num_layers=len(self.full_attention),
            num_experts=self.num_experts,
            top_k=self.top_k,
        )

    @property
    def skipped(self) -> tuple[str, ...]:
        return ("mtp.", "lm_head.") if self.tied else ("mtp.",)

    def weight_map(self) -> Iterator[Weight]:
        return _weight_map(self)

    def expert_map(self) -> Iterator[ExpertWeights]:
        return _expert_map(self)

    def build(self, bank: Bank, *, dtype: torch.dtype) -> CausalLM:
        return Qwen3Next(self, bank, dtype=dtype)


def parse(raw: dict[str, Any]) -> Config:
    fields = Fields(raw)
    for name, value in (
        ("decoder_sparse_step", 1),
        ("attention_bias", False),
        ("attn_output_gate", True),
        ("hidden_act", "silu"),
    ):
        fields.demand(name, value, default=value)
    if raw.get("mlp_only_layers"):
        raise CheckpointError("config.json: mlp_only_layers must be empty: all layers have experts")
    _check_quantization(fields.section("quantization_config"))
    rope = read_rope(fields)
    head_dim = fields.integer("head_dim")
    config = Config(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        full_attention=_layer_types(fields),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=rope.theta,
        rotary_dim=int(head_dim * rope.partial),
        heads=fields.integer("num_attention_heads"),
        kv_heads=fields.integer("num_key_value_heads"),
        head_dim=head_dim,
        key_heads=fields.integer("linear_num_key_heads"),
        value_heads=fields.integer("linear_num_value_heads"),
        key_dim=fields.integer("linear_key_head_dim"),
        value_dim=fields.integer("linear_value_head_dim"),
        conv_kernel=fields.integer("linear_conv_kernel_dim"),
        num_experts=fields.integer("num_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        norm_topk_prob=fields.boolean("norm_topk_prob", True),
        expert_size=fields.integer("moe_intermediate_size"),
        shared_size=fields.integer("shared_expert_intermediate_size"),
        tied=fields.boolean("tie_word_embeddings", False),
    )
    _check_config(config)
    return config


def _layer_types(fields: Fields) -> tuple[bool, ...]:
    num_layers = fields.integer("num_hidden_layers")
    if "layer_types" not in fields:
        interval = fields.integer("full_attention_interval")
        return tuple((layer + 1) % interval == 0 for layer in range(num_layers))
    types = fields.strings("layer_types")
    unknown = set(types) - {"full_attention", "linear_attention"}
    if unknown or len(types) != num_layers:
        raise CheckpointError(
            f"config.json: layer_types must name {num_layers} layers as full_attention or "
            f"linear_attention; it has {len(types)}, of types {', '.join(sorted(set(types)))}"
        )
    return tuple(kind == "full_attention" for kind in types)


def _check_quantization(fields: Fields) -> None:
    """What is quantised shows in the tensors; here only schemes that would be misread."""
    if fields.raw:
        fields.demand("quant_method", "fp8")
        fields.demand("fmt", "e4m3", default="e4m3")
        fields.demand("weight_block_size", [128, 128])


def _check_config(config: Config) -> None:
    """Numbers that only make sense together."""
    wrong = (
        (config.heads % config.kv_heads, "num_attention_heads / num_key_value_heads"),
        (config.value_heads % config.key_heads, "linear_num_value_heads / linear_num_key_heads"),
    )
    for rest, ratio in wrong:
        if rest:
            raise CheckpointError(f"config.json: {ratio} is not a whole number")
    if not 0 < config.rotary_dim <= config.head_dim or config.rotary_dim % 2:
        raise CheckpointError(
            f"config.json: partial_rotary_factor gives {config.rotary_dim} rotating dimensions of "
            f"{config.head_dim}; they must be even and fit the head"
        )
    if config.top_k > config.num_experts:
        raise CheckpointError("config.json: num_experts_per_tok exceeds num_experts")
    if config.conv_kernel < 2:
        raise CheckpointError("config.json: linear_conv_kernel_dim must be at least 2")


def _weight_map(config: Config) -> Iterator[Weight]:
    """Every dense parameter; projections that read the same input become one matrix."""
    hidden, vocab = (config.hidden_size,), (config.vocab_size, config.hidden_size)
    yield Weight("embedding.weight", (Part("model.embed_tokens.weight", vocab),))
    yield Weight("norm.weight", (Part("model.norm.weight", hidden),), one_plus)
    if not config.tied:
        yield Weight("head.weight", (Part("lm_head.weight", vocab),))
    for layer, full in enumerate(config.full_attention):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        for mine, stored in (("norm", "input_layernorm"), ("moe_norm", "post_attention_layernorm")):
            part = Part(f"{theirs}{stored}.weight", hidden)
            yield Weight(f"{ours}{mine}.weight", (part,), one_plus)
        if full:
            yield from _attention_map(config, f"{ours}mixer.", f"{theirs}self_attn.")
        else:
            yield from _deltanet_map(config, f"{ours}mixer.", f"{theirs}linear_attn.")
        yield from _moe_map(config, f"{ours}moe.", f"{theirs}mlp.")


def _attention_map(config: Config, ours: str, theirs: str) -> Iterator[Weight]:
    c = config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    parts = (
        Part(f"{theirs}q_proj.weight", (2 * queries, c.hidden_size)),
        Part(f"{theirs}k_proj.weight", (keys, c.hidden_size)),
        Part(f"{theirs}v_proj.weight", (keys, c.hidden_size)),
    )
    yield Weight(f"{ours}in_proj.weight", parts, partial(_part_gates, c))
    yield Weight(
        f"{ours}out_proj.weight", (Part(f"{theirs}o_proj.weight", (c.hidden_size, queries)),)
    )
    for mine, stored in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        part = Part(f"{theirs}{stored}.weight", (c.head_dim,))
        yield Weight(f"{ours}{mine}.weight", (part,), one_plus)


def _part_gates(config: Config, query_gate: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """q_proj alternates head by head between query and gate; here all queries come first."""
    by_head = query_gate.view(config.heads, 2, config.head_dim, -1)
    return torch.cat((by_head.transpose(0, 1).reshape(query_gate.shape), key, value))


def _deltanet_map(config: Config, ours: str, theirs: str) -> Iterator[Weight]:
    c = config
    values = c.value_heads * c.value_dim
    parts = (
        Part(f"{theirs}in_proj_qkvz.weight", (c.channels + values, c.hidden_size)),
        Part(f"{theirs}in_proj_ba.weight", (2 * c.value_heads, c.hidden_size)),
    )
    yield Weight(f"{ours}in_proj.weight", parts, partial(_part_key_heads, c))
    conv = Part(f"{theirs}conv1d.weight", (c.channels, 1, c.conv_kernel))
    yield Weight(f"{ours}conv", (conv,), _time_first)
    yield Weight(f"{ours}a_log", (Part(f"{theirs}A_log", (c.value_heads,)),))
    yield Weight(f"{ours}dt_bias", (Part(f"{theirs}dt_bias", (c.value_heads,)),))
    yield Weight(f"{ours}norm.weight", (Part(f"{theirs}norm.weight", (c.value_dim,)),))
    yield Weight(
        f"{ours}out_proj.weight", (Part(f"{theirs}out_proj.weight", (c.hidden_size, values)),)
    )


def _time_first(conv: Tensor) -> Tensor:
    """Depthwise weights [channels, 1, kernel] -> [kernel, channels]"""
    return conv.squeeze(1).T


def _part_key_heads(config: Config, qkvz: Tensor, ba: Tensor) -> Tensor:
    """Both matrices are stored key head by key head; here each kind's rows stand together."""
    wide = config.value_heads // config.key_heads * config.value_dim
    sizes = [config.key_dim, config.key_dim, wide, wide]
    kinds = torch.split(qkvz.view(config.key_heads, -1, qkvz.shape[1]), sizes, dim=1)
    gates = ba.view(config.key_heads, -1, ba.shape[1]).chunk(2, dim=1)
    return torch.cat([kind.flatten(0, 1) for kind in (*kinds, *gates)])


def _moe_map(config: Config, ours: str, theirs: str) -> Iterator[Weight]:
    c = config
    gates = (
        Part(f"{theirs}gate.weight", (c.num_experts, c.hidden_size)),
        Part(f"{theirs}shared_expert_gate.weight", (1, c.hidden_size)),
    )
    yield Weight(f"{ours}gates", gates)
    shared = f"{theirs}shared_expert."
    wide = (c.shared_size, c.hidden_size)
    gate_up = (Part(f"{shared}gate_proj.weight", wide), Part(f"{shared}up_proj.weight", wide))
    yield Weight(f"{ours}shared.gate_up.weight", gate_up)
    yield Weight(f"{ours}shared.down.weight", (Part(f"{shared}down_proj.weight", wide[::-1]),))


def _expert_map(config: Config) -> Iterator[ExpertWeights]:
    for layer in range(len(config.full_attention)):
        expert = f"model.layers.{layer}.mlp.experts.{{}}."
        yield ExpertWeights(
            gate=f"{expert}gate_proj.weight",
            up=f"{expert}up_proj.weight",
            down=f"{expert}down_proj.weight",
            num_experts=config.num_experts,
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_size,
        )


class Step(NamedTuple):
    """What all layers share of one step, computed once."""

    rotation: Rotation
    keys: KeyIndex | None  # None: the model has no attention layer
    runs: RunIndex


class Layer(nn.Module):
    """Mixer and MoE block, each with a norm before it and a residual around it."""

    def __init__(self, config: Config, *, full: bool, moe: MoEBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = _attention(config, dtype) if full else _deltanet(config, dtype)
        self.moe_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.moe = moe

    def forward(self, hidden: Tensor, step: Step, cache: LayerCache) -> Tensor:
        hidden = hidden + self._mix(self.norm(hidden), step, cache)
        out: Tensor = hidden + self.moe(self.moe_norm(hidden))
        return out

    def _mix(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        if isinstance(cache, AttentionCache):
            mixed: Tensor = self.mixer(x, step.rotation, step.keys, cache)
        else:
            mixed = self.mixer(x, step.runs, cache)
        return mixed


def _attention(config: Config, dtype: torch.dtype) -> GatedAttention:
    return GatedAttention(
        config.hidden_size,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        dtype=dtype,
    )


def _deltanet(config: Config, dtype: torch.dtype) -> GatedDeltaNet:
    return GatedDeltaNet(
        config.hidden_size,
        key_heads=config.key_heads,
        value_heads=config.value_heads,
        key_dim=config.key_dim,
        value_dim=config.value_dim,
        kernel=config.conv_kernel,
        eps=config.rms_norm_eps,
        dtype=dtype,
    )


class Qwen3Next(CausalLM):
    def __init__(self, config: Config, bank: Bank, *, dtype: torch.dtype) -> None:
        super().__init__(config.shape, bank)
        self.config, self.dtype = config, dtype
        self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.rotary = Rotary(config.rotary_dim, theta=config.rope_theta)
        self.layers = nn.ModuleList()
        for full, experts in zip(config.full_attention, bank.layers, strict=True):
            moe = MoEBlock(
                config.hidden_size,
                shared_size=config.shared_size,
                num_experts=config.num_experts,
                top_k=config.top_k,
                renormalise=config.norm_topk_prob,
                experts=experts,
                dtype=dtype,
            )
            self.layers.append(Layer(config, full=full, moe=moe, dtype=dtype))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = None
        if not config.tied:
            self.head = Linear(config.hidden_size, config.vocab_size, dtype=dtype)

    def forward(self, batch: Batch, caches: list[LayerCache]) -> Tensor:
        page_size = next((c.page_size for c in caches if isinstance(c, AttentionCache)), None)
        step = Step(
            rotation=self.rotary(batch.positions),
            keys=None if page_size is None else index_keys(batch, page_size),
            runs=index_runs(batch),
        )
        hidden = self.embedding(batch.token_ids)
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer(hidden, step, cache)
        out: Tensor = self.norm(hidden)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(hidden, weight).float()

    def cache_shape(self) -> CacheShape:
        c, itemsize = self.config, self.dtype.itemsize
        full = sum(c.full_attention)
        state = c.value_heads * c.key_dim * c.value_dim * torch.float32.itemsize
        history = c.channels * (c.conv_kernel - 1) * itemsize
        return CacheShape(
            bytes_per_token=full * 2 * c.kv_heads * c.head_dim * itemsize,
            bytes_per_slot=(len(c.full_attention) - full) * (state + history),
        )

    def new_caches(self, *, num_pages: int, page_size: int, num_slots: int) -> list[LayerCache]:
        c, device = self.config, self.embedding.weight.device
        tokens = (num_pages, page_size, c.kv_heads, c.head_dim)
        history = (num_slots, c.conv_kernel - 1, c.channels)
        state = (num_slots, c.value_heads, c.key_dim, c.value_dim)
        caches: list[LayerCache] = []
        for full in c.full_attention:
            if full:
                key, value = (torch.zeros(tokens, dtype=self.dtype, device=device) for _ in "kv")
                caches.append(AttentionCache(key, value))
            else:
                conv = torch.zeros(history, dtype=self.dtype, device=device)
                caches.append(RecurrentCache(conv, torch.zeros(state, device=device)))
        return caches
