from __future__ import annotations

import torch

from kttrio.layers.mlp import GatedMLP


def test_the_first_rows_are_the_gate():
    mlp = GatedMLP(2, 1, dtype=torch.float32)
    mlp.gate_up.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    mlp.down.weight.copy_(torch.tensor([[1.0], [-2.0]]))
    out = mlp(torch.tensor([[3.0, 5.0]]))
    gated = 3 * torch.sigmoid(torch.tensor(3.0)) * 5
    torch.testing.assert_close(out, torch.stack([gated, -2 * gated])[None])
