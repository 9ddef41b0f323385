"""The bench of the ring, on a tiny layer."""

from __future__ import annotations

import json

import pytest

from kttrio.config import ConfigError
from tools.bench import ring
from tools.bench.layers import Shape

TINY = Shape(num_experts=9, top_k=3, hidden_size=128, intermediate_size=96)


def test_a_record_for_each_shape_and_format(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ring.SHAPES, "qwen3-next", TINY)
    file = tmp_path / "ring.json"
    flags = ["--device", "cpu", "--shapes", "qwen3-next", "--formats", "fp8", "int4"]
    assert ring.run([*flags, "--slots", "4", "--seconds", "0", "--json", str(file)]) == 0
    passages = json.loads(file.read_text())["passages"]
    assert [passage["name"] for passage in passages] == ["qwen3-next fp8", "qwen3-next int4"]
    for passage in passages:
        assert min(passage[rate] for rate in ("unpacked", "copied", "streamed")) > 0
        assert passage["share"] == passage["streamed"] / passage["copied"]
    assert "of the copy" in capsys.readouterr().out


def test_without_a_device_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(ring, "open_device", lambda kind: None)
    with pytest.raises(ConfigError, match="with cpu"):
        ring.run([])
