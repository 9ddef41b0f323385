from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from kttrio.config import ConfigError
from kttrio.experts.foreign import open_experts
from kttrio.weights.loader import ExpertWeights

WEIGHTS = ExpertWeights("g.{}", "u.{}", "d.{}", 2, hidden_size=64, intermediate_size=32)


def merged(bits):
    """Names and sizes as kt-kernel's converter merges them, for two NUMA parts."""
    part = torch.zeros(64 * 32 * bits // 8 // 2, dtype=torch.uint8)
    return {
        f"blk.3.ffn_{matrix}_exps.{expert}.numa.{numa}.{kind}": part.clone()
        for matrix in ("gate", "up", "down")
        for expert in range(2)
        for numa in range(2)
        for kind in ("weight", "scale")
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_a_merged_conversion_is_refused_with_the_line_that_replaces_it(tmp_path, bits):
    directory = tmp_path / "has blanks"
    directory.mkdir()
    save_file(merged(bits), directory / "model.safetensors")
    line = f"kttrio quant --input {tmp_path}/model --output '{directory}-kttrio' --method int{bits}"
    with pytest.raises(ConfigError, match=re.escape(line)):
        open_experts(directory, tmp_path / "model", WEIGHTS)


@pytest.mark.parametrize("method", ["int4", "int8"])
def test_raw_files_are_recognised_too(tmp_path, method):
    folder = tmp_path / "_layer_3" / "_numa_1"
    folder.mkdir(parents=True)
    (folder / f"{method.upper()}_down_7_65536Byte_quant_.kt").write_bytes(b"")
    line = f"kttrio quant --input m --output {tmp_path}-kttrio --method {method}"
    with pytest.raises(ConfigError, match=re.escape(line)):
        open_experts(tmp_path, tmp_path.__class__("m"), WEIGHTS)


def test_a_conversion_that_has_not_ended_is_named(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "experts-00001-of-00002.safetensors")
    with pytest.raises(ConfigError, match=r"the conversion has not ended; .* --resume"):
        open_experts(tmp_path, tmp_path, WEIGHTS)


def test_any_other_checkpoint_is_opened(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with open_experts(tmp_path, tmp_path, WEIGHTS) as checkpoint:
        assert "a" in checkpoint
