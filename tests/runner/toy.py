"""A model of arithmetic with real caches, and chunks for it: no weights, but every index counts.

Its hidden row holds the sum of the sequence's tokens twice: once carried in the recurrent slot of
its first layer, once gathered from the pages of its second. A wrong slot, page, offset, position,
order or number of MLPs changes the logits.
"""

from __future__ import annotations

import torch

from kttrio.layers.cache import AttentionCache, RecurrentCache
from kttrio.layers.step import Step
from kttrio.models.base import Activations
from kttrio.plan import Capacity, Chunk
from kttrio.request import SamplingParams
from kttrio.runner.runner import Runner

VOCAB = 97
PAGE_SIZE = 4
CAPACITY = Capacity(
    num_slots=20,
    num_pages=200,
    page_size=PAGE_SIZE,
    context_length=64,
    max_step_tokens=512,
    vocab_size=VOCAB,
)


def toy_hidden(token_ids) -> torch.Tensor:
    """The hidden row after the last token of a whole sequence."""
    total = sum(token_ids) % VOCAB
    return torch.tensor([[total, total, len(token_ids) - 1]], dtype=torch.float32)


def toy_logits(hidden: torch.Tensor) -> torch.Tensor:
    """[n, 3] -> [n, VOCAB]: rugged, different for every history; the last two are never drawn."""
    weights = torch.tensor([1.0, 0.37, 2.11], dtype=torch.float64)
    phase = hidden.double() @ weights
    logits = (4 * torch.sin((phase[:, None] + 1.3) * torch.arange(1, VOCAB + 1))).float()
    logits[:, -2:] -= 100.0
    return logits


class ToyModel:
    """`forward` raises for the token `poison`; `broken` makes its logits NaN.

    Its drafts are right for a greedy sequence, but for about one in `slips`. The layer that makes
    them checks that it has seen the whole sequence, each token at the position before its own.
    """

    poison = VOCAB - 1
    broken = VOCAB - 2
    num_layers = 2

    def __init__(self, slips: int = 3) -> None:
        self.closed = False
        self.slips = slips
        self.logit_rows: list[int] = []
        self.trails: list[tuple[int, list[torch.Tensor]]] = []  # slot, its state after each token

    def new_caches(self, *, num_pages, page_size, num_slots):
        pages = torch.full((num_pages, page_size, 1, 1), torch.nan)
        state = torch.full((num_slots, 1, 1, 1), torch.nan)
        return [
            AttentionCache(pages, pages.clone()),
            RecurrentCache(torch.full((num_slots, 1, 3), torch.nan), state),
            AttentionCache(pages.clone(), pages.clone()),
        ]

    def forward(self, batch, caches):
        step, hidden = Step(batch), self.embed(batch)
        for layer in range(self.num_layers):
            hidden = self.mix(layer, hidden, step, caches)
            hidden[:, 2] += 1
        return self.finish(hidden)

    def embed(self, batch):
        if (batch.token_ids == self.poison).any():
            raise RuntimeError("poisoned")
        if not all(length == 1 for length in batch.lengths[: batch.num_decodes]):
            raise AssertionError("decodes come first")
        tokens = batch.token_ids.float()
        positions = batch.positions.float()
        positions[batch.token_ids == self.broken] = torch.nan
        return torch.stack([tokens, tokens, positions], dim=1)

    def new_step(self, batch):
        return Step(batch)

    def mix(self, layer, hidden, step, caches):
        return (self._carry, self._gather)[layer](hidden.clone(), step.batch, caches)

    def _carry(self, hidden, batch, caches):
        recurrent, self.trails = caches[1], []
        for i, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
            slot = batch.slots[i]
            state = recurrent.state[slot].sum() if start else torch.tensor(0.0)
            trail = []
            for row in range(batch.offsets[i], batch.offsets[i] + length):
                state = (state + hidden[row, 0]) % VOCAB
                hidden[row, 0] = state
                trail.append(state)
            if any(batch.num_drafts[i : i + 1]):
                self.trails.append((slot, trail))
            else:
                recurrent.state[slot] = state
        return hidden

    def _gather(self, hidden, batch, caches):
        attention = caches[0]
        attention.key.view(-1)[batch.kv_index] = hidden[:, 1]
        for i, length in enumerate(batch.lengths):
            pages = attention.key[batch.page_table[i]].flatten()
            for row in range(batch.offsets[i], batch.offsets[i] + length):
                hidden[row, 1] = pages[: int(batch.positions[row]) + 1].sum() % VOCAB
        return hidden

    def feed(self, layer, rows, *, piece, carry=None):
        assert rows.hidden.shape == rows.normed.shape == rows.out.shape
        for part in rows.pieces(piece):
            part.hidden[:, 2] += 1
            yield

    def finish(self, hidden):
        broken = hidden[:, 2:].isnan()
        return (hidden - torch.tensor([0, 0, self.num_layers])).masked_fill(broken, torch.nan)

    def new_activations(self, num_tokens):
        return Activations.new(num_tokens, 3, dtype=torch.float32, device=torch.device("cpu"))

    def settle(self, lengths, caches):
        assert len(lengths) == len(self.trails)
        for length, (slot, trail) in zip(lengths.tolist(), self.trails, strict=True):
            caches[1].state[slot] = trail[length - 1]

    def draft(self, batch, hidden, caches):
        """The rows that `forward` will have one position on, or others where it slips."""
        pages, own = caches[0].key, caches[2].key
        own.view(-1)[batch.kv_index] = batch.token_ids.float()
        rows = []
        for i, length in enumerate(batch.lengths):
            first = pages[batch.page_table[i]].flatten()[0]
            seen = own[batch.page_table[i]].flatten()
            for row in range(batch.offsets[i], batch.offsets[i] + length):
                position = int(batch.positions[row])
                total = (first + seen[: position + 1].sum()) % VOCAB
                ahead = (hidden[row] + batch.token_ids[row]) % VOCAB
                assert position == hidden[row, 2], "not the row of this position"
                assert total == ahead[1], "the layer has not seen it all"
                slip = float((7 * total + position) % self.slips == 0)
                rows.append(torch.stack([ahead[0] + slip, total, torch.tensor(position + 1.0)]))
        return torch.stack(rows)

    def logits(self, hidden):
        self.logit_rows.append(len(hidden))
        return toy_logits(hidden)

    def close(self) -> None:
        self.closed = True


def toy_runner() -> Runner:
    model = ToyModel()
    caches = model.new_caches(
        num_pages=CAPACITY.num_pages, page_size=PAGE_SIZE, num_slots=CAPACITY.num_slots
    )
    return Runner(model, caches, capacity=CAPACITY, device=torch.device("cpu"))


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 16, "seed": 1, **changes})


def chunk_of(slot=0, *, start=0, token_ids=(1,), num_prompt=None, sample=True, **sampling) -> Chunk:
    """A chunk whose pages are those that no other slot uses, in a scrambled order."""
    end = start + len(token_ids)
    pages = tuple((slot * 10 + 7 * i) % 10 + slot * 10 for i in range(-(-end // PAGE_SIZE)))
    return Chunk(
        slot=slot,
        start=start,
        token_ids=tuple(token_ids),
        pages=pages,
        sampling=params(**sampling),
        sample=sample,
        num_prompt_tokens=end if num_prompt is None else num_prompt,
    )
