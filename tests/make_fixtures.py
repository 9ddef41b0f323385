"""Makes the golden checkpoints of tests/fixtures with transformers (needs the `demo` extra).

    python tests/make_fixtures.py [DIRECTORY]

Every parameter is random and non-trivial: default initialisation (norm weights 0 or 1, slow
states) would hide bugs. All matrices are rounded to bfloat16 before the logits are computed in
float32, so that storing them as bfloat16 loses nothing. Key and value dimensions differ, which a
transposed state does not survive.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

SEED, VOCAB, TOKENS = 1234, 256, 41
ROPE_THETA, PARTIAL = 1e7, 0.25
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "intermediate_size": 96,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": ROPE_THETA,
        "partial_rotary_factor": PARTIAL,
    },
}
# Two blocks of 128 in hidden, a whole and a ragged one in the experts: the scales' layout shows.
WIDE = {
    **SMALL,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 64,
    "num_experts": 8,
    "moe_intermediate_size": 160,
    "shared_expert_intermediate_size": 96,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 32,
}
QUANTISED = re.compile(
    r"(self_attn\.[qkvo]_proj|in_proj_qkvz|out_proj|(experts\.\d+|shared_expert)\.\w+_proj)\.weight$"
)
BLOCK, LARGEST = 128, 448.0


def randomise(model: torch.nn.Module) -> None:
    """Values of a sensible scale; matrices exact in bfloat16."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("A_log"):  # slow decay: the state really carries memory
            value = (noise.sigmoid() * 0.4 + 0.01).log()
        elif name.endswith("dt_bias"):
            value = noise * 0.5
        elif parameter.ndim == 1:  # stays around zero or one, whichever its norm means
            value = float(parameter.detach().mean()) + 0.2 * noise
        elif "conv1d" in name:
            value = noise * 0.4
        else:
            gain = 4.0 if re.search(r"mlp\.gate\.|q_proj", name) else 1.0
            value = noise * gain * parameter.shape[-1] ** -0.5
        if parameter.ndim > 1:
            value = value.bfloat16().float()
        parameter.data.copy_(value)


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) -> e4m3 and the scale of each 128 x 128 block, written apart from kttrio's own."""
    rows, columns = weight.shape
    data = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    for row in range(0, rows, BLOCK):
        for column in range(0, columns, BLOCK):
            at = slice(row, row + BLOCK), slice(column, column + BLOCK)
            factor = weight[at].abs().max() / LARGEST
            data[at] = (weight[at] / factor).to(torch.float8_e4m3fn)
            scale[row // BLOCK, column // BLOCK] = factor
    return data, scale


def dequantise(data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    weight = data.float()
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            weight[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK] *= scale[
                row, column
            ]
    return weight


def build(fields: dict) -> torch.nn.Module:
    config = transformers.Qwen3NextConfig(**fields)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model)
    return model


@torch.no_grad()
def golden(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, 240, (1, TOKENS), generator=generator)
    return {"input_ids": ids[0], "logits": model(input_ids=ids, use_cache=False).logits[0].float()}


def stored(model: torch.nn.Module, directory: Path) -> dict[str, torch.Tensor]:
    """The tensors under their published names."""
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def compact(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: t.bfloat16() if t.ndim > 1 and t.dtype is torch.float32 else t
        for name, t in tensors.items()
    }


def write_bf16(target: Path) -> None:
    """Two shards with an index, rope fields nested, a prediction head that is to be skipped."""
    model = build(SMALL)
    with tempfile.TemporaryDirectory() as scratch:
        tensors = compact(stored(model, Path(scratch)))
        config = json.loads((Path(scratch) / "config.json").read_text())
    tensors["mtp.fc.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)
    shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    first, second = shards
    for name, tensor in tensors.items():
        shards[second if re.search(r"layers\.[23]\.|lm_head", name) else first][name] = tensor
    target.mkdir(parents=True, exist_ok=True)
    for file, content in shards.items():
        save_file(content, target / file)
    where = {name: file for file, content in sorted(shards.items()) for name in sorted(content)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(golden(model), target / "golden.safetensors")


def write_fp8(target: Path) -> None:
    """One file, flat rope fields and no list of layers, as the first checkpoints were published."""
    with tempfile.TemporaryDirectory() as scratch:
        tensors = stored(build(WIDE), Path(scratch))
        quantised = {name: quantise(t) for name, t in tensors.items() if QUANTISED.search(name)}
        tensors |= {name: dequantise(*parts) for name, parts in quantised.items()}
        save_file(tensors, Path(scratch) / "model.safetensors")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            scratch, attn_implementation="eager", dtype=torch.float32
        ).eval()
        config = json.loads((Path(scratch) / "config.json").read_text())
    for name, (data, scale) in quantised.items():
        tensors[name], tensors[f"{name}_scale_inv"] = data, scale
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    del config["rope_parameters"], config["layer_types"]
    config |= {
        "full_attention_interval": 2,
        "partial_rotary_factor": PARTIAL,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        },
        "rope_scaling": None,
        "rope_theta": ROPE_THETA,
        "torch_dtype": "bfloat16",
    }
    config.pop("dtype", None)
    target.mkdir(parents=True, exist_ok=True)
    save_file(compact(tensors) | scales, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(golden(model), target / "golden.safetensors")


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "fixtures"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    write_bf16(root / "qwen3_next")
    write_fp8(root / "qwen3_next_fp8")


if __name__ == "__main__":
    main()
