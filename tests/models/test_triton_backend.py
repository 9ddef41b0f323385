"""Every family with attention by Triton kernels: the logits that torch gives. In Triton's
interpreter each key counts, so that sequences are short."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton: pip install triton")

from tests.golden import Sequences, load_golden, reference_model
from tests.models.test_static_decode import FAMILIES, StaticSequences

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda directory: directory.name)
def checkpoint(request):
    return request.param


@pytest.fixture(scope="module")
def models(checkpoint):
    """By torch, and by kernels."""
    return reference_model(checkpoint), reference_model(checkpoint, backend="triton")


@pytest.fixture(scope="module")
def prompts(checkpoint):
    first = load_golden(checkpoint)["input_ids"].tolist()
    return [first[:17], first[5:12], first[20:37], first[3:4]]


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_ragged_batch_gives_the_same_logits(models, prompts):
    """Chunks alone, decodes alone, and both; more keys than an indexer chooses, and fewer."""
    expected, found = (Sequences(model, prompts) for model in models)
    for lengths in ((13, 5, 0, 0), (1, 1, 14, 1), (3, 0, 1, 0), (0, 1, 1, 0)):
        outs = expected.step(lengths)
        for i, logits in found.step(lengths).items():
            near(logits, outs[i])


def test_static_decodes_give_the_same_logits(models, prompts):
    expected, found = Sequences(models[0], prompts), StaticSequences(models[1], prompts, num_rows=5)
    expected.step((15, 5, 9, 0))
    found.step((15, 5, 9, 0))
    for decoding in (range(4), range(3)):
        outs = expected.step([int(i in decoding) for i in range(4)])
        near(found.decode(decoding), torch.cat([outs[i] for i in decoding]))
