from __future__ import annotations

import pytest
import torch

from kttrio.plan import StepPlan
from kttrio.runner.findings import NOT_FINITE, Evaluator
from kttrio.runner.masks import NOTHING_ALLOWED
from kttrio.runner.sampler import Sampler
from kttrio.runner.tensors import StepBuilder
from tests.fakes import MadeMasks, mask_of
from tests.runner.toy import PAGE_SIZE, VOCAB, chunk_of, toy_hidden, toy_logits

CPU = torch.device("cpu")


class Bench:
    """An evaluator, and the true hidden rows of chunks that follow `before`."""

    def __init__(self):
        self.rows = []
        sampler = Sampler(num_slots=20, vocab_size=VOCAB, device=CPU)
        self.evaluator = Evaluator(self.logits, sampler)
        self.builder = StepBuilder(page_size=PAGE_SIZE, device=CPU)

    def logits(self, hidden):
        self.rows.append(len(hidden))
        return toy_logits(hidden)

    def evaluate(self, *chunks, before):
        """Results in the step's order: single tokens first."""
        step = self.builder.build(StepPlan(chunks))
        rows = [
            toy_hidden((*before[chunk.slot], *chunk.token_ids[: n + 1]))
            for chunk in step.chunks
            for n in range(len(chunk.token_ids))
        ]
        return self.evaluator.evaluate(step, torch.cat(rows))


def answer(sequence, count):
    """What greedy decoding appends."""
    found = list(sequence)
    for _ in range(count):
        found.append(int(toy_logits(toy_hidden(found)).argmax()))
    return tuple(found[len(sequence) :])


def verifying(slot, before, token_ids, **sampling):
    settings = {"temperature": 0.0, "num_prompt": len(before), **sampling}
    chunk = chunk_of(slot, start=len(before), token_ids=token_ids, **settings)
    return chunk._replace(num_drafts=len(token_ids) - 1)


@pytest.mark.parametrize("right", range(5))
def test_drafts_stand_up_to_the_first_wrong_one(right):
    before, first = (1, 2, 3), 40
    true = answer((*before, first), 5)
    drafts = (*true[:right], *((token + 1) % VOCAB for token in true[right:4]))
    (found,) = Bench().evaluate(verifying(0, before, (first, *drafts)), before={0: before})
    assert found.tokens == true[: right + 1]


def test_sequences_of_a_step_are_verified_each_on_its_own():
    before = {0: (4, 5), 1: (6,), 2: (7, 8, 9)}
    true = {slot: answer((*tokens, 40), 3) for slot, tokens in before.items()}
    bench = Bench()
    found = bench.evaluate(
        verifying(0, before[0], (40, *true[0][:2])),
        verifying(1, before[1], (40,)),
        verifying(2, before[2], (40, true[2][0], VOCAB - 4)),
        before=before,
    )
    assert [result.tokens for result in found] == [true[1][:1], true[0], true[2][:2]]
    assert bench.rows == [7]  # one product with the head, however many places are drawn


def test_a_place_counts_the_drafts_before_it_as_output():
    """With a huge frequency penalty no token comes twice; rejected drafts are not counted."""
    before, bench = (1, 2, 3), Bench()
    penalty = {"frequency_penalty": 1000.0}
    prompt = chunk_of(0, token_ids=before, temperature=0.0, **penalty)
    (found,) = bench.evaluate(prompt, before={0: ()})
    outputs, known = [*found.tokens], before
    for _ in range(8):
        last = outputs[-1]
        wrong = next(t for t in range(VOCAB) if t not in outputs)
        chunk = verifying(0, known, (last, wrong, wrong), num_prompt=3, **penalty)
        (found,) = bench.evaluate(chunk, before={0: known})
        taken = found.tokens[:1] if found.tokens[0] != wrong else found.tokens
        outputs += taken
        known = (*known, last, *taken[:-1])
    assert len(set(outputs)) == len(outputs)


def test_logits_that_break_behind_a_draft_end_the_sequence():
    before = (1, 2)
    true = answer((*before, 40), 1)
    step = Bench()
    chunk = verifying(0, before, (40, *true))
    built = step.builder.build(StepPlan((chunk, verifying(1, before, (40,)))))
    rows = torch.cat(
        [toy_hidden((*before, 40)), toy_hidden((*before, 40)), torch.full((1, 3), torch.nan)]
    )
    sound, broken = step.evaluator.evaluate(built, rows)
    assert sound.tokens == true
    assert (broken.tokens, broken.error) == ((), NOT_FINITE)


def test_a_draft_that_is_refused_may_break_as_it_likes():
    before = (1, 2)
    true = answer((*before, 40), 1)
    wrong = (true[0] + 1) % (VOCAB - 2)
    bench = Bench()
    built = bench.builder.build(StepPlan((verifying(0, before, (40, wrong)),)))
    rows = torch.cat([toy_hidden((*before, 40)), torch.full((1, 3), torch.nan)])
    (found,) = bench.evaluator.evaluate(built, rows)
    assert (found.tokens, found.error) == (true, None)


def held(chunk, *allowed):
    """The chunk with masks of these tokens, a reason, or None for all."""
    masks = allowed[0] if isinstance(allowed[0], str) else [mask_of(tokens) for tokens in allowed]
    return chunk._replace(masks=MadeMasks(masks))


BEFORE = (1, 2, 3)


def next_of(token_ids, among=range(VOCAB)):
    """The best token after BEFORE and these."""
    logits = toy_logits(toy_hidden((*BEFORE, *token_ids)))[0]
    return max(among, key=lambda token: (float(logits[token]), -token))


def test_each_place_has_its_own_mask():
    second, third = range(0, VOCAB, 7), range(3, VOCAB, 11)
    first = next_of((40,))
    after = next_of((40, first), second)
    last = next_of((40, first, after), third)
    chunk = held(verifying(0, BEFORE, (40, first, after)), None, second, third)
    (found,) = Bench().evaluate(chunk, before={0: BEFORE})
    assert found.tokens == (first, after, last)


def test_a_draft_that_may_not_come_is_refused_and_nothing_behind_it_looked_at():
    first = next_of((40,))
    others = [token for token in range(VOCAB) if token != first]
    chunk = held(verifying(0, BEFORE, (40, first)), others, [])
    (found,) = Bench().evaluate(chunk, before={0: BEFORE})
    assert (found.tokens, found.error) == ((next_of((40,), others),), None)


@pytest.mark.parametrize(
    ("masks", "error"),
    [(("the form broke",), "the form broke"), (([5], []), NOTHING_ALLOWED), (([5],), "1 masks")],
)
def test_what_is_wrong_with_masks_ends_their_own_sequence(masks, error):
    broken = held(verifying(0, BEFORE, (40, 5)), *masks)
    sound = held(verifying(1, BEFORE, (40, 5)), [5], [6])
    before = dict.fromkeys(range(3), BEFORE)
    found = Bench().evaluate(broken, sound, verifying(2, BEFORE, (40,)), before=before)
    plain, failed, held_one = found
    assert (plain.tokens, held_one.tokens) == ((next_of((40,)),), (5, 6))
    assert failed.tokens == ()
    assert error in failed.error


def test_masks_that_fail_for_all_are_no_failure_of_the_step():
    chunks = [held(verifying(slot, BEFORE, (40,)), "boom") for slot in range(2)]
    found = Bench().evaluate(*chunks, before=dict.fromkeys(range(2), BEFORE))
    assert [result.error for result in found] == ["boom", "boom"]


def test_masks_are_waited_for_when_the_logits_are_under_way():
    order = []

    class Late(MadeMasks):
        def wait(self):
            order.append("masks")
            return super().wait()

    bench = Bench()
    evaluator = bench.evaluator
    evaluator._logits = lambda hidden: (order.append("logits"), toy_logits(hidden))[1]
    chunk = verifying(0, BEFORE, (40,))._replace(masks=Late([mask_of([9])]))
    (found,) = bench.evaluate(chunk, before={0: BEFORE})
    assert (found.tokens, order) == ((9,), ["logits", "masks"])
