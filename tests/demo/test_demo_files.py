"""The committed demo checkpoint is whole: files, sizes, tensors, tokenizer, template, questions."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "kttrio" / "demo"
DATA = ROOT / "tools" / "demo"
FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def read(name):
    return json.loads((DEMO / name).read_text())


def header():
    """Tensor names with dtype and shape, straight from the file's own header."""
    with (DEMO / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}


def expected_shapes(config):
    """Published names and shapes of a Qwen3-Next checkpoint with this config."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes = {
        "model.embed_tokens.weight": [vocab, hidden],
        "lm_head.weight": [vocab, hidden],
        "model.norm.weight": [hidden],
    }
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}."
        full = (layer + 1) % config["full_attention_interval"] == 0
        parts = {**(attention_shapes(config) if full else deltanet_shapes(config))}
        parts |= moe_shapes(config)
        parts |= {"input_layernorm.weight": [hidden], "post_attention_layernorm.weight": [hidden]}
        shapes |= {stem + name: shape for name, shape in parts.items()}
    return shapes


def attention_shapes(config):
    hidden, dim = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    return {
        "self_attn.q_proj.weight": [2 * queries, hidden],
        "self_attn.k_proj.weight": [keys, hidden],
        "self_attn.v_proj.weight": [keys, hidden],
        "self_attn.o_proj.weight": [hidden, queries],
        "self_attn.q_norm.weight": [dim],
        "self_attn.k_norm.weight": [dim],
    }


def deltanet_shapes(config):
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    return {
        "linear_attn.in_proj_qkvz.weight": [2 * keys + 2 * values, hidden],
        "linear_attn.in_proj_ba.weight": [2 * heads, hidden],
        "linear_attn.conv1d.weight": [2 * keys + values, 1, config["linear_conv_kernel_dim"]],
        "linear_attn.A_log": [heads],
        "linear_attn.dt_bias": [heads],
        "linear_attn.norm.weight": [config["linear_value_head_dim"]],
        "linear_attn.out_proj.weight": [hidden, values],
    }


def moe_shapes(config):
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    shared = config["shared_expert_intermediate_size"]
    shapes = {"mlp.gate.weight": [config["num_experts"], hidden]}
    shapes["mlp.shared_expert_gate.weight"] = [1, hidden]
    owners = [(f"experts.{e}", inner) for e in range(config["num_experts"])]
    for owner, width in [*owners, ("shared_expert", shared)]:
        shapes[f"mlp.{owner}.gate_proj.weight"] = [width, hidden]
        shapes[f"mlp.{owner}.up_proj.weight"] = [width, hidden]
        shapes[f"mlp.{owner}.down_proj.weight"] = [hidden, width]
    return shapes


def render(messages, **extra):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((DEMO / "chat_template.jinja").read_text())
    return template.render(messages=messages, add_generation_prompt=True, **extra)


def test_all_files_are_there_and_small():
    assert sorted(file.name for file in DEMO.iterdir() if file.is_file()) == sorted(FILES)
    assert sum((DEMO / name).stat().st_size for name in FILES) <= 16 * 1024 * 1024


def test_tensors_are_the_published_ones_in_the_configs_shapes():
    found = header()
    plain = {n: shape for n, (_, shape) in found.items() if not n.endswith("_scale_inv")}
    assert plain == expected_shapes(read("config.json"))


def test_every_fp8_tensor_has_a_scale_for_each_block():
    found = header()
    quantised = [name for name, (dtype, _) in found.items() if dtype == "F8_E4M3"]
    scales = [name for name in found if name.endswith("_scale_inv")]
    assert sorted(scales) == sorted(f"{name}_scale_inv" for name in quantised)
    for name in quantised:
        rows, columns = found[name][1]
        assert found[f"{name}_scale_inv"] == ("F32", [-(-rows // 128), -(-columns // 128)])


def test_config_names_every_rope_field_and_the_end_tokens_agree():
    config, tokenizer = read("config.json"), Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert config["rope_theta"] > 0
    assert 0 < config["partial_rotary_factor"] < 1
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    assert read("generation_config.json")["eos_token_id"] == ends
    assert config["eos_token_id"] == ends[0]
    assert read("tokenizer_config.json")["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!  two  spaces\n\n\ttab",
        "São Paulo, Kraków, 東京, नमस्ते, 🧑‍🚀",
        "x" * 300,
        "<tool_call>\n<function=f>\n</function>\n</tool_call>",
        "".join(chr(code) for code in range(1, 0x2FF)),
        "<|im_start|>user\nhi<|im_end|>\n",
    ],
)
def test_tokenizer_round_trips(text):
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tool_markup_survives_when_special_tokens_are_skipped():
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = tokenizer.encode("<tool_call>x</tool_call><|im_end|>").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>x</tool_call>"


def test_a_name_has_the_same_tokens_after_a_space_and_at_a_line_start():
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    name = tokenizer.encode("Reykjavik").ids
    assert tokenizer.encode("in Reykjavik").ids[-len(name) :] == name
    assert len(name) > 2


def test_template_without_tools():
    text = render([{"role": "user", "content": "Hello"}])
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_template_takes_content_in_parts():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert render([{"role": "user", "content": parts}]) == render(
        [{"role": "user", "content": "Hello"}]
    )


def test_template_with_tools_call_and_result():
    call = {"function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "tool", "content": "warm", "tool_call_id": "2"},
    ]
    assert render(messages, tools=[WEATHER]) == (
        "<|im_start|>system\nBe brief.\nTools:\nget_weather(city) Weather in a city<|im_end|>\n"
        "<|im_start|>user\nWeather in Oslo?<|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n"
        "</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n"
        "<tool_response>\nwarm\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_listed_questions_are_valid():
    facts = json.loads((DATA / "questions.json").read_text())
    assert len(facts) >= 40
    wordings = [text for fact in facts for text in (fact["question"], *fact["paraphrases"])]
    assert len(wordings) == len(set(wordings))
    for fact in facts:
        assert fact["must_contain"]
        assert all(part in fact["answer"] for part in fact["must_contain"]), fact["question"]
        assert fact["held_out"] not in wordings


def test_held_out_cities_are_not_among_the_taught_ones():
    held_out = {name.lower() for name in json.loads((DATA / "held_out_cities.json").read_text())}
    taught = {name.lower() for name in json.loads((DATA / "names.json").read_text())["cities"]}
    assert len(held_out) >= 50
    assert not held_out & taught
