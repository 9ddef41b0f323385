"""Decode steps that only tensors describe: they give what ordinary ones give, in every family, and
nothing in them waits for the device or remembers a value."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from kttrio.layers.batch import decode_batch
from tests.golden import FIXTURES, PAGE_SIZE, Sequences, load_golden, reference_model, run_alone

FAMILIES = sorted(
    file.parent
    for file in FIXTURES.glob("*/golden.safetensors")
    if not file.parent.name.endswith("_fp8")
)
SCRATCH_SLOT = 0  # `Sequences` lends no such slot


class AllExperts:
    """Every expert for every token: no host looks at the ids."""

    def __init__(self, experts):
        self.experts = experts

    def forward(self, x, routing, beside=None, carry=None):
        experts = self.experts
        inner = F.silu(torch.einsum("th,eih->tei", x, experts.gate))
        inner = inner * torch.einsum("th,eih->tei", x, experts.up)
        outs = torch.einsum("tei,ehi->teh", inner, experts.down)
        weights = x.new_zeros(outs.shape[:2]).scatter_(1, routing.ids.long(), routing.weights)
        out = (outs * weights.unsqueeze(2)).sum(1)
        return out if beside is None else out + beside()


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda directory: directory.name)
def checkpoint(request):
    return request.param


@pytest.fixture(scope="module")
def model(checkpoint):
    model = reference_model(checkpoint)
    for block in model.moe_blocks().values():
        block.experts = AllExperts(block.experts)
    return model


@pytest.fixture(scope="module")
def prompt(checkpoint):
    return load_golden(checkpoint)["input_ids"].tolist()


class StaticSequences(Sequences):
    """Its decodes pass as static batches of `num_rows`."""

    def __init__(self, model, prompts, num_rows):
        super().__init__(model, prompts)
        used = {page for pages in self.pages for page in pages}
        (self.scratch_page,) = set(range(len(used) + 1)) - used
        self.num_rows = num_rows
        self.hidden = lambda *tensors: self.compute(*tensors)

    def compute(self, *tensors):
        return self.model(decode_batch(*tensors, page_size=PAGE_SIZE), self.caches)

    def tensors(self, decoding):
        """Token ids, positions, slots, page table: those of the sequences, then padding."""
        padding = self.num_rows - len(decoding)
        rows = [
            (self.prompts[i][self.starts[i]], self.starts[i], self.slot(i), self.pages[i])
            for i in decoding
        ]
        blank = (0, 0, SCRATCH_SLOT, (self.scratch_page,) * len(self.pages[0]))
        columns = zip(*rows, *[blank] * padding, strict=True)
        return [torch.tensor(column) for column in columns]

    def decode(self, decoding):
        """Logits of the next token of each of these sequences."""
        hidden = self.hidden(*self.tensors(decoding))
        for i in decoding:
            self.starts[i] += 1
        return self.model.logits(hidden[: len(decoding)])

    def capture(self, decoding):
        """Every later decode replays what is traced here; tracing computes nothing."""
        with torch.no_grad():
            trace = make_fx(self.compute, tracing_mode="fake", _allow_non_fake_inputs=True)
            self.hidden = trace(*self.tensors(decoding))


@pytest.mark.parametrize("capture", [False, True], ids=["plain", "captured"])
def test_static_decodes_equal_ordinary_ones(model, prompt, capture):
    """Of sequences of very different lengths, one of them new; more rows than sequences."""
    prompts = [prompt[:20], prompt[7:12], prompt[::-1][:33], prompt[5:8]]
    sequences = StaticSequences(model, prompts, num_rows=6)
    with torch.no_grad():
        sequences.step([17, 2, 30, 0])
        if capture:
            sequences.capture([0, 1])
        steps = [sequences.decode(range(4)) for _ in range(3)]
        for i, tokens in enumerate(prompts):
            expected = run_alone(model, tokens, (len(tokens),))[-3:]
            found = torch.stack([step[i] for step in steps])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_captured_step_serves_any_sequences(model, prompt):
    """Other slots, pages and positions than it was captured with, and another number of them."""
    prompts = [prompt[:9], prompt[3:40], prompt[20:25]]
    sequences = StaticSequences(model, prompts, num_rows=3)
    with torch.no_grad():
        sequences.capture([0])
        outs = [sequences.decode([1]) for _ in range(20)]
        outs += [sequences.decode([1, 0])[:1] for _ in range(9)]
        outs += [sequences.decode([2, 1])[1:] for _ in range(5)]
        outs += [sequences.decode([1]) for _ in range(3)]
        expected = run_alone(model, prompts[1], (37,))
    torch.testing.assert_close(torch.cat(outs), expected, rtol=0, atol=1e-3)
