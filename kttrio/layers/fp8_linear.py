"""A matrix that stays as an FP8 checkpoint stores it: e4m3 with a scale per block of 128 x 128.

Two schemes. W8A16 multiplies activations as they are, with weights that are widened on the way; it
takes no more memory traffic and loses nothing. W8A8 rounds activations to e4m3 too, each token's
128 columns by a scale of their own, so that chips with FP8 products use these (DeepSeek-AI,
"DeepSeek-V3 Technical Report", 2024, section 3.3): what FP8 checkpoints are published for. The
scheme never depends on the number of tokens, or results would depend on how a prompt is cut.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kttrio.layers.backend import Backend
from kttrio.layers.linear import Linear
from kttrio.weights.formats import fp8
from kttrio.weights.formats.base import Packed

Scheme = Literal["w8a16", "w8a8"]


def best_scheme(device: torch.device) -> Scheme:
    """What the chip is made for: FP8 products came with Ada, compute capability 8.9."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return "w8a8"
    return "w8a16"


class Fp8Linear(nn.Module):
    """x @ (weight * scale).T + bias; x and result in bfloat16 or float32, sums in float32."""

    def __init__(self, plain: Linear, *, backend: Backend, scheme: Scheme) -> None:
        """Takes the shape, the bias and the device of `plain`, and its place."""
        super().__init__()
        self.backend, self.scheme = backend, scheme
        like = plain.weight
        data = torch.empty(like.shape, dtype=torch.float8_e4m3fn, device=like.device)
        scale = torch.empty(fp8.scale_shape(tuple(like.shape)), device=like.device)
        self.weight = nn.Parameter(data, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self._multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], len(self.weight))
        return out if self.bias is None else out + self.bias

    def _multiply(self, x: Tensor) -> Tensor:
        packed = Packed(self.weight, self.scale)
        if self.backend == "torch":
            return fp8_linear(x, packed, scheme=self.scheme)
        from kttrio.layers.triton.fp8_linear import fp8_linear as fused

        return fused(x, packed, scheme=self.scheme)


def fp8_linear(x: Tensor, packed: Packed, *, scheme: Scheme) -> Tensor:
    """x [tokens, in] @ weights.T: [tokens, out] in x's dtype. The reference in torch."""
    wide = x.float() if scheme == "w8a16" else rounded(x)
    return F.linear(wide, fp8.dequantize(packed, torch.float32)).to(x.dtype)


def rounded(x: Tensor) -> Tensor:
    """x [tokens, columns] in float32, as W8A8 multiplies it: each token's largest of 128 columns
    comes to lie at the end of e4m3's range."""
    padded = F.pad(x.float(), (0, -x.shape[1] % fp8.BLOCK))
    blocks = padded.view(len(x), padded.shape[1] // fp8.BLOCK, fp8.BLOCK)
    unit = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / fp8.LARGEST
    codes = (blocks / unit).to(torch.float8_e4m3fn)
    return (codes.float() * unit).flatten(1)[:, : x.shape[1]]
