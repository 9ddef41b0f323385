"""Where the tests of kernels run: on the GPU, or in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device"),
]
