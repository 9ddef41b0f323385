"""The Qwen3-Next forward pass in plain torch, made for training on a CPU: no cache, no decoding.

Parameter names and shapes are those of the published checkpoints, except that a layer's experts
are stacked. `tests/demo` proves the logits equal to transformers'. Saving lives in `save.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 32


class Norm(nn.Module):
    """Zero-centred RMS norm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1.0 + self.weight, self.eps)


class PlainNorm(nn.Module):
    """RMS norm of each value head, with a plain weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Gated full attention with partial rotary embedding."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.dim = config["hidden_size"], config["head_dim"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = linear(hidden, self.heads * self.dim * 2)
        self.k_proj = linear(hidden, self.kv_heads * self.dim)
        self.v_proj = linear(hidden, self.kv_heads * self.dim)
        self.o_proj = linear(self.heads * self.dim, hidden)
        self.q_norm = Norm(self.dim, config["rms_norm_eps"])
        self.k_norm = Norm(self.dim, config["rms_norm_eps"])
        self.rotary = int(self.dim * config["partial_rotary_factor"])
        self.theta = config["rope_theta"]

    def rotate(self, x: Tensor) -> Tensor:  # [batch, tokens, heads, dim]
        half = self.rotary // 2
        steps = torch.arange(half, dtype=torch.float32) * 2 / self.rotary
        angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None] / self.theta**steps
        cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
        a, b, rest = x.split((half, half, self.dim - self.rotary), dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, gate = self.q_proj(x).view(batch, tokens, self.heads, 2 * self.dim).chunk(2, dim=-1)
        key = self.k_proj(x).view(batch, tokens, self.kv_heads, self.dim)
        value = self.v_proj(x).view(batch, tokens, self.kv_heads, self.dim)
        query, key = self.rotate(self.q_norm(query)), self.rotate(self.k_norm(key))
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.repeat_interleave(self.heads // self.kv_heads, dim=2).transpose(1, 2),
            value.repeat_interleave(self.heads // self.kv_heads, dim=2).transpose(1, 2),
            is_causal=True,
        )
        out = out.transpose(1, 2) * torch.sigmoid(gate)
        return self.o_proj(out.reshape(batch, tokens, -1))


def delta_rule(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """The gated delta rule in chunks.

    All inputs are [batch, heads, chunks, CHUNK, ...]; `decay` is the log decay of each token.
    """
    total = decay.cumsum(-1)  # [batch, heads, chunks, CHUNK]
    upper = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    pairs = (total[..., :, None] - total[..., None, :]).masked_fill(upper, float("-inf")).exp()
    key_beta = key * beta[..., None]
    system = (key_beta @ key.mT) * pairs
    right = torch.cat((value * beta[..., None], key_beta * total.exp()[..., None]), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new, old = solved.split((value.shape[-1], key.shape[-1]), dim=-1)
    inside = (query @ key.mT) * pairs
    query = query * total.exp()[..., None]
    key = key * (total[..., -1:] - total).exp()[..., None]
    last = total[..., -1].exp()[..., None, None]
    state, outs = torch.zeros(()), []
    for i in range(query.shape[2]):
        fresh = new[:, :, i] if i == 0 else new[:, :, i] - old[:, :, i] @ state
        out = inside[:, :, i] @ fresh
        outs.append(out if i == 0 else out + query[:, :, i] @ state)
        update = key[:, :, i].mT @ fresh
        state = update if i == 0 else state * last[:, :, i] + update
    return torch.stack(outs, dim=2)


class DeltaNet(nn.Module):
    """Gated DeltaNet, the linear attention of three layers out of four."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.k_heads, self.v_heads = (
            config["linear_num_key_heads"],
            config["linear_num_value_heads"],
        )
        self.k_dim, self.v_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
        keys, values = self.k_heads * self.k_dim, self.v_heads * self.v_dim
        self.in_proj_qkvz = linear(hidden, 2 * keys + 2 * values)
        self.in_proj_ba = linear(hidden, 2 * self.v_heads)
        width, channels = config["linear_conv_kernel_dim"], 2 * keys + values
        self.conv1d = nn.Conv1d(
            channels, channels, width, groups=channels, padding=width - 1, bias=False
        )
        self.A_log = nn.Parameter(torch.empty(self.v_heads).uniform_(1, 16).log())
        step = torch.empty(self.v_heads).uniform_(-6.9, -2.3).exp()  # log-uniform, 0.001 to 0.1
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.norm = PlainNorm(self.v_dim, config["rms_norm_eps"])
        self.out_proj = linear(values, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        ratio = self.v_heads // self.k_heads
        parts = self.in_proj_qkvz(x).view(batch, tokens, self.k_heads, -1)
        q, k, v, z = parts.split(
            (self.k_dim, self.k_dim, ratio * self.v_dim, ratio * self.v_dim), -1
        )
        b, a = self.in_proj_ba(x).view(batch, tokens, self.k_heads, -1).chunk(2, dim=-1)
        mixed = torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1)
        mixed = F.silu(self.conv1d(mixed.mT)[..., :tokens]).mT
        keys = self.k_heads * self.k_dim
        q, k, v = mixed.split((keys, keys, mixed.shape[-1] - 2 * keys), dim=-1)
        q = F.normalize(q.reshape(batch, tokens, self.k_heads, -1), dim=-1) * self.k_dim**-0.5
        k = F.normalize(k.reshape(batch, tokens, self.k_heads, -1), dim=-1)
        v = v.reshape(batch, tokens, self.v_heads, -1)
        q, k = q.repeat_interleave(ratio, dim=2), k.repeat_interleave(ratio, dim=2)
        decay = -self.A_log.exp() * F.softplus(a.flatten(2) + self.dt_bias)
        beta = torch.sigmoid(b.flatten(2))
        out = delta_rule(*(in_chunks(t) for t in (q, k, v, beta, decay)))
        out = out.flatten(2, 3)[:, :, :tokens].transpose(1, 2)  # [batch, tokens, heads, dim]
        z = z.reshape(batch, tokens, self.v_heads, self.v_dim)
        return self.out_proj((self.norm(out) * F.silu(z)).flatten(2))


def in_chunks(x: Tensor) -> Tensor:
    """[batch, tokens, heads, ...] -> [batch, heads, chunks, CHUNK, ...], zeros at the tail."""
    x = x.transpose(1, 2)
    pad = -x.shape[2] % CHUNK
    x = F.pad(x, (0, 0, 0, pad) if x.dim() == 4 else (0, pad))
    return x.unflatten(2, (-1, CHUNK))


class Router(nn.Module):
    """Scores all experts; only a holder of the published weight name."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(F.linear(x, self.weight), dim=-1)


class Experts(nn.Module):
    def __init__(self, count: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Rows of `x` are sorted by expert; `sizes` says how many each gets."""
        outs = []
        weights = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        for rows, (gate_up, down) in zip(x.split(sizes), weights, strict=True):
            gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
            outs.append(F.linear(F.silu(gate) * up, down))
        return torch.cat(outs)


class Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, inner), linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Moe(nn.Module):
    """Router, routed experts and the shared expert.

    Keeps the last step's `counts` per expert and its balancing `loss`, over the tokens of `real`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.top = config["hidden_size"], config["num_experts_per_tok"]
        self.gate = Router(hidden, config["num_experts"])
        self.experts = Experts(config["num_experts"], hidden, config["moe_intermediate_size"])
        self.shared_expert = Mlp(hidden, config["shared_expert_intermediate_size"])
        self.shared_expert_gate = linear(hidden, 1)
        self.counts, self.loss = torch.zeros(()), torch.zeros(())

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """`x` [tokens, hidden]; rows outside `real` (padding) go through the shared expert only."""
        scores = self.gate(x.index_select(0, real))
        weights, ids = scores.topk(self.top, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        experts = scores.shape[-1]
        self.counts = torch.bincount(ids.flatten(), minlength=experts)
        share = self.counts / ids.numel()
        self.loss = experts * (share * scores.mean(0)).sum()
        order = ids.flatten().argsort(stable=True)
        rows = real[order // self.top]
        share_of_row = weights.flatten().index_select(0, order)[:, None]
        out = self.experts(x.index_select(0, rows), self.counts.tolist()) * share_of_row
        shared = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return shared.index_add(0, rows, out)


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any], index: int) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        if (index + 1) % config["full_attention_interval"] == 0:
            self.self_attn = Attention(config)
        else:
            self.linear_attn = DeltaNet(config)
        self.mlp = Moe(config)
        self.input_layernorm = Norm(hidden, eps)
        self.post_attention_layernorm = Norm(hidden, eps)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        mixer = self.self_attn if hasattr(self, "self_attn") else self.linear_attn
        x = x + mixer(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x).flatten(0, 1), real).view_as(x)


class Body(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config["num_hidden_layers"]))
        self.norm = Norm(config["hidden_size"], config["rms_norm_eps"])


class Model(nn.Module):
    """The whole model; rows of a batch are independent and padded on the right."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = Body(config)
        self.lm_head = linear(config["hidden_size"], config["vocab_size"])
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=start_std(name, parameter, config))

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Hidden states [batch, tokens, hidden] after the final norm; padding rows mean nothing."""
        real = (torch.arange(ids.shape[1])[None] < lengths[:, None]).flatten().nonzero()[:, 0]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, real)
        return self.model.norm(x)  # type: ignore[no-any-return]

    def blocks(self) -> list[Moe]:
        return [layer.mlp for layer in self.model.layers]  # type: ignore[misc]


def start_std(name: str, parameter: Tensor, config: dict[str, Any]) -> float:
    """Fan-in scaling; what writes to the residual stream starts smaller in a deeper model."""
    if "embed" in name:
        return 0.1
    if "lm_head" in name or "gate.weight" in name:
        return 0.02
    if "conv1d" in name:
        return 0.3
    deep: float = (2 * config["num_hidden_layers"]) ** -0.5
    writes = any(part in name for part in ("o_proj", "out_proj", "down_proj"))
    return float(0.7 * parameter.shape[-1] ** -0.5 * (deep if writes else 1.0))
