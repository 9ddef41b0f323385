"""Checkpoints of the demo model: published tensor names, FP8 with block scales, and back again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.demo.model import Model

BLOCK = 128
QUANTISED = re.compile(
    r"(self_attn\.[qkvo]_proj|in_proj_qkvz|out_proj|(gate|up|down)_proj|gate_up_proj)(\.weight)?$"
)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., out, in] -> e4m3 weight and fp32 scale of each 128x128 block, the last ragged."""
    rows, columns = weight.shape[-2:]
    down, right = -rows % BLOCK, -columns % BLOCK
    padded = torch.nn.functional.pad(weight.float(), (0, right, 0, down))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = blocks.abs().amax((-3, -1)).clamp(min=1e-12) / 448.0
    scaled = blocks / scale[..., :, None, :, None]
    small = scaled.clamp(-448, 448).flatten(-4, -3).flatten(-2)[..., :rows, :columns]
    return small.to(torch.float8_e4m3fn).contiguous(), scale


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    rows, columns = weight.shape[-2:]
    full = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return weight.float() * full[..., :rows, :columns]


def served(name: str, value: Tensor) -> Tensor:
    """The value that the saved checkpoint will hold for this training parameter."""
    if not QUANTISED.search(name):
        return value.to(torch.bfloat16).float()
    if name.endswith("gate_up_proj"):  # gate and up are two tensors with blocks of their own
        return torch.cat([dequantise(*quantise(half)) for half in value.chunk(2, dim=1)], dim=1)
    return dequantise(*quantise(value))


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacked experts become one tensor per expert and matrix."""
    out = {}
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(part.chunk(2) for part in value):
                out[f"{name.removesuffix('gate_up_proj')}{e}.gate_proj.weight"] = gate
                out[f"{name.removesuffix('gate_up_proj')}{e}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(value):
                out[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = down
        else:
            out[name] = value
    return out


def save(model: Model, path: Path) -> None:
    """Write `model.safetensors`: e4m3 with scales where Qwen's FP8 files have it, else bf16."""
    tensors: dict[str, Tensor] = {}
    for name, value in published(model.state_dict()).items():
        if QUANTISED.search(name):
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(value)
        else:
            tensors[name] = value.to(torch.bfloat16).contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def load(path: Path) -> Model:
    """The model as it is served: the saved weights, dequantised to float32."""
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    stored = load_file(path / "model.safetensors")
    plain = {
        name: dequantise(value, stored[f"{name}_scale_inv"])
        if f"{name}_scale_inv" in stored
        else value.float()
        for name, value in stored.items()
        if not name.endswith("_scale_inv")
    }
    model = Model(config)
    model.load_state_dict({name: gather(name, plain) for name in model.state_dict()})
    return model.eval()


def gather(name: str, plain: dict[str, Tensor]) -> Tensor:
    """The training parameter `name` out of the published tensors."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return plain[name]
    stem, matrix = name.rsplit(".", 1)
    parts = ("gate_proj", "up_proj") if matrix == "gate_up_proj" else ("down_proj",)
    count = sum(key.startswith(f"{stem}.") and key.endswith("down_proj.weight") for key in plain)
    return torch.stack(
        [torch.cat([plain[f"{stem}.{e}.{part}.weight"] for part in parts]) for e in range(count)]
    )
