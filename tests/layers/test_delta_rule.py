from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kttrio.layers.delta_rule import delta_chunks, delta_step

LANES, HEADS, KEY, VALUE = 2, 3, 16, 24  # unequal on purpose: a transposed state must show


def recurrence(query, key, value, decay, beta, state):
    """The definition, token by token and head by head."""
    outs = torch.empty_like(value)
    state = state.clone()
    for n in range(query.shape[0]):
        for h in range(query.shape[2]):
            memory = state[n, h]
            for t in range(query.shape[1]):
                memory = memory * decay[n, t, h].exp()  # before the delta is taken
                delta = beta[n, t, h] * (value[n, t, h] - key[n, t, h] @ memory)
                memory = memory + torch.outer(key[n, t, h], delta)
                outs[n, t, h] = query[n, t, h] @ memory
            state[n, h] = memory
    return outs, state


def inputs(length, strongest_decay=2.0):
    generator = torch.Generator().manual_seed(length)
    query, key = (
        F.normalize(torch.randn(LANES, length, HEADS, KEY, generator=generator), dim=-1)
        for _ in range(2)
    )
    value = torch.randn(LANES, length, HEADS, VALUE, generator=generator)
    decay = -torch.rand(LANES, length, HEADS, generator=generator) * strongest_decay
    beta = torch.rand(LANES, length, HEADS, generator=generator)
    state = torch.randn(LANES, HEADS, KEY, VALUE, generator=generator)
    return query, key, value, decay, beta, state


def test_one_step_is_the_recurrence():
    *tokens, state = inputs(1)
    expected, expected_state = recurrence(*tokens, state)
    out = delta_step(*(x[:, 0] for x in tokens), state)
    torch.testing.assert_close(out, expected[:, 0])
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("length", [1, 2, 37, 64, 128, 192])
def test_chunks_are_the_recurrence_with_a_carried_state(length):
    *tokens, state = inputs(length)
    expected, expected_state = recurrence(*tokens, state)
    out, new_state = delta_chunks(*tokens, state)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new_state, expected_state, rtol=1e-4, atol=1e-5)


def test_fast_decay_does_not_overflow():
    """The logs of a chunk add up to -6400: exp of what is above the diagonal would be infinite."""
    *tokens, state = inputs(64, strongest_decay=200.0)
    expected, expected_state = recurrence(*tokens, state)
    out, new_state = delta_chunks(*tokens, state)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(new_state, expected_state, rtol=1e-3, atol=1e-4)


def test_padding_leaves_the_state_alone():
    query, key, value, decay, beta, state = inputs(64)
    key[:, 40:], decay[:, 40:] = 0, 0
    whole, after = delta_chunks(query, key, value, decay, beta, state)
    short = (x[:, :40] for x in (query, key, value, decay, beta))
    expected, expected_after = delta_chunks(*short, state)
    torch.testing.assert_close(whole[:, :40], expected)
    torch.testing.assert_close(after, expected_after)
