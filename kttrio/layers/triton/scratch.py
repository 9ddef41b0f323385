"""Device memory that the kernels of grouped experts take while they run: known without Triton."""

from __future__ import annotations

import torch

_BYTES = 64 << 20  # for activations, and as much for outputs of down that are not summed yet
SUM_COLUMNS = 128  # the fewest of them at once


def tokens_at_once(top_k: int, width: int, itemsize: int) -> int:
    """Tokens whose activations, `top_k` rows of `width` numbers each, fit: enough that each expert
    is read for many of them."""
    return max(_BYTES // (top_k * width * itemsize), 1)


def columns_at_once(num_choices: int, hidden_size: int) -> int:
    """Of down's outputs: all for few choices, else as many as fit, or the fewest."""
    fitting = _BYTES // (torch.float32.itemsize * num_choices) // SUM_COLUMNS * SUM_COLUMNS
    return min(max(fitting, SUM_COLUMNS), hidden_size)


def scratch_bytes(num_tokens: int, top_k: int, sizes: tuple[int, int], itemsize: int) -> int:
    """The most that a call with so many tokens takes, beside a few integers for each choice.

    `sizes`: hidden and intermediate; `itemsize` is that of x. Activations, outputs, and x once
    more, as int4 needs it.
    """
    hidden_size, width = sizes
    tokens = min(num_tokens, tokens_at_once(top_k, width, itemsize))
    choices = tokens * top_k
    outputs = choices * columns_at_once(choices, hidden_size) * torch.float32.itemsize
    return outputs + (choices * width + tokens * hidden_size) * itemsize
