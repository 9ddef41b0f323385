"""The bench of divided models, as a whole on a tiny one, the CPU standing in for a GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from kttrio.config import ConfigError
from kttrio.device.host import HostDevice
from tests.machines import GIB, stand_in
from tools import synthetic
from tools.bench import handoffs, hybrid
from tools.bench.handoffs import HandoffCell, measure_handoff
from tools.bench.hybrid import HybridConfig, link_speed, measure_hybrid, run
from tools.bench.hybrid_cells import DecodeCell, Findings, PrefillCell, print_tables

TINY = HybridConfig(
    device="cpu",
    layers=3,
    shares=(0, 50),
    sequences=(1, 3),
    prompts=(20, 70),
    steps=20,
    chunk=48,
    threads=1,
)
WAYS = ["all on host", "0 % on cpu", "50 % on cpu"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    fields = synthetic.config(layers=3, experts=8, hidden=64, intermediate=32)
    monkeypatch.setattr(hybrid, "SHAPE", fields)
    monkeypatch.setattr(hybrid, "LINK_BYTES", 1 << 16)
    monkeypatch.setattr(handoffs, "NUM_LAYERS", 2)


def printed(show):
    console = Console(width=100)
    with console.capture() as capture:
        show(console)
    return capture.get()


def test_every_way_is_measured():
    found = []
    text = printed(lambda console: found.append(measure_hybrid(TINY, console)))
    (findings,) = found
    assert text == ""
    assert [(cell.way, cell.sequences) for cell in findings.decode] == [
        (way, number) for way in WAYS for number in (1, 3)
    ]
    for cell in findings.decode:
        assert cell.tokens_per_second == pytest.approx(1e3 * cell.sequences / cell.milliseconds)
        assert cell.microseconds_per_layer == pytest.approx(1e3 * cell.milliseconds / 3)
    assert [(cell.way, cell.tokens) for cell in findings.prefill] == [
        (way, number) for way in WAYS for number in (20, 70)
    ]
    sent = {(cell.way, cell.tokens): cell.sent_gigabytes for cell in findings.prefill}
    assert sent["all on host", 70] == 0
    assert 0 < sent["50 % on cpu", 70] < sent["0 % on cpu", 70]
    assert findings.handoff[0].way == "in order"
    assert "3 layers of 8 experts, 8 used" in findings.model


def test_the_layers_are_as_many_as_fit(tmp_path):
    shape = hybrid.SHAPE | {"num_hidden_layers": 30}
    config = replace(TINY, layers=None, chunk=256)
    assert hybrid.largest(config, stand_in(host=GIB), shape, tmp_path) == 30
    shape["num_experts"] = 512
    fewer = hybrid.largest(config, stand_in(host=GIB // 8), shape, tmp_path)
    assert 0 < fewer < 30
    with pytest.raises(ConfigError, match="not even a few layers fit"):
        hybrid.largest(config, stand_in(host=GIB // 64), shape, tmp_path)


def test_captured_hand_overs_are_measured_beside_plain_ones():
    cells = measure_handoff(HostDevice(), way="twin", captures=True)
    assert [(cell.way, cell.captured) for cell in cells] == [("twin", False), ("twin", True)]


def test_a_link_has_a_speed():
    assert link_speed(HostDevice()) > 1e6


def test_the_tables_show_what_was_found():
    findings = Findings(
        model="48 layers",
        link_gigabytes_per_second=53.5,
        decode=[
            DecodeCell("all on host", 1, False, 20.0, 416.7, 50.0),
            DecodeCell("25 % on cuda", 1, True, 10.0, 208.3, 100.0),
        ],
        prefill=[PrefillCell("25 % on cuda", 4096, 2.0, 2048.0, 96.3, 0.9)],
        handoff=[HandoffCell("flags", True, 12.34)],
    )
    text = printed(lambda console: print_tables(findings, console))
    rows = [line.split() for line in text.splitlines()]
    assert ["all", "on", "host", "1", "plain", "20.00", "417", "50.0", "1.000"] in rows
    assert ["25", "%", "on", "cuda", "1", "captured", "10.00", "208", "100.0", "0.500"] in rows
    assert ["25", "%", "on", "cuda", "4096", "2.000", "2048", "96.30", "90%"] in rows
    assert ["flags", "captured", "12.3"] in rows
    assert "53.5 GB/s" in text


def test_the_record_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    place = tmp_path / "hybrid.json"
    flags = "--device cpu --layers 3 --shares 50 --sequences 2 --prompts 40 --steps 20 --chunk 32"
    assert run([*flags.split(), "--json", str(place)]) == 0
    record = json.loads(place.read_text())
    assert record["flags"]["shares"] == [50]
    assert [cell["way"] for cell in record["decode"]] == ["all on host", "50 % on cpu"]
    assert record["handoff"][0]["captured"] is False
