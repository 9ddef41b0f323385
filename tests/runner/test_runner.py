from __future__ import annotations

import pytest
import torch

from kttrio.plan import Chunk, ChunkResult, StepPlan
from kttrio.runner.runner import Runner
from tests.runner.toy import (
    CAPACITY,
    ToyModel,
    chunk_of,
    toy_hidden,
    toy_logits,
    toy_runner,
)


def expected_token(token_ids) -> int:
    return int(toy_logits(toy_hidden(token_ids)).argmax())


def step(runner, *chunks):
    return runner.step(StepPlan(chunks)).chunks


def greedy(slot, token_ids, **changes):
    return chunk_of(slot, token_ids=token_ids, temperature=0.0, **changes)


def generate(runner, slot, prompt, count, *, others=(), **sampling):
    """Tokens of one sequence; `others` are decodes of other slots that run beside every step."""
    tokens, start, drawn = tuple(prompt), 0, []
    for number in range(count):
        own = chunk_of(slot, start=start, token_ids=tokens, num_prompt=len(prompt), **sampling)
        beside = [chunk(number) for chunk in others]
        place = len(beside) // 2
        results = step(runner, *beside[:place], own, *beside[place:])
        drawn.append(results[place].tokens[0])
        start, tokens = start + len(tokens), (drawn[-1],)
    return drawn


class TestStep:
    def test_results_stand_in_the_plans_order(self):
        prompts = [(1, 2, 3), (4,), (5, 6), (7,), (8, 9, 10, 11, 12)]
        results = step(toy_runner(), *[greedy(slot, p) for slot, p in enumerate(prompts)])
        assert [result.tokens[0] for result in results] == [expected_token(p) for p in prompts]

    def test_any_chunking_draws_the_same(self):
        prompt = tuple(range(3, 22))
        for cuts in ([19], [1, 18], [4, 4, 4, 7], [1] * 19, [18, 1]):
            runner, start = toy_runner(), 0
            for size in cuts:
                end = start + size
                (result,) = step(
                    runner,
                    greedy(
                        4, prompt[start:end], start=start, num_prompt=19, sample=end == len(prompt)
                    ),
                )
                assert (result.tokens == ()) == (end < len(prompt))
                start = end
            assert result.tokens[0] == expected_token(prompt)

    def test_generation_follows_the_model(self):
        drawn = generate(toy_runner(), 3, (5, 6, 7), 12, temperature=0.0)
        sequence = [5, 6, 7]
        for token in drawn:
            assert token == expected_token(sequence)
            sequence.append(token)

    def test_a_request_draws_the_same_alone_and_among_17_others(self):
        settings = {"seed": 77, "temperature": 1.5, "top_p": 0.95, "presence_penalty": 0.5}
        alone = generate(toy_runner(), 0, (9, 8, 7), 10, **settings)

        def other(slot):
            def chunk(number):
                # Some prefill a new prompt in every step, some decode a foreign sequence.
                if slot % 2:
                    return chunk_of(slot, token_ids=range(slot, slot + 5), seed=slot)
                return chunk_of(
                    slot, start=number, token_ids=(slot,), num_prompt=1, top_k=5, seed=slot
                )

            return chunk

        others = [other(slot) for slot in range(1, 18)]
        assert generate(toy_runner(), 18, (9, 8, 7), 10, others=others, **settings) == alone
        assert len(set(alone)) > 3

    def test_only_rows_that_are_needed_become_logits(self):
        model = ToyModel()
        caches = model.new_caches(num_pages=200, page_size=4, num_slots=20)
        runner = Runner(model, caches, capacity=CAPACITY, device=torch.device("cpu"))
        step(runner, greedy(0, (1, 2, 3)), greedy(1, (4, 5), sample=False, num_prompt=9))
        assert model.logit_rows == [1]
        step(runner, greedy(1, (4, 5), start=2, sample=False, num_prompt=9))
        assert model.logit_rows == [1]

    def test_plain_ints_leave_the_runner(self):
        (result,) = step(toy_runner(), greedy(0, (1, 2), logprobs=2))
        assert type(result.tokens[0]) is int
        assert type(result.logprobs[0].token) is int
        assert [type(value) for pair in result.logprobs[0].top for value in pair] == [
            int,
            float,
        ] * 2

    def test_an_empty_plan_is_an_empty_result(self):
        result = toy_runner().step(StepPlan(()))
        assert result.chunks == ()
        assert result.seconds >= 0.0

    def test_seconds_are_measured(self):
        assert toy_runner().step(StepPlan((greedy(0, (1,)),))).seconds > 0.0

    def test_close_frees_the_model(self):
        model = ToyModel()
        caches = model.new_caches(num_pages=2, page_size=4, num_slots=2)
        Runner(model, caches, capacity=CAPACITY, device=torch.device("cpu")).close()
        assert model.closed
        assert caches == []

    def test_close_frees_the_model_whatever_fails_before(self):
        class Failing:
            def close(self):
                raise OSError("broken")

        runner = toy_runner()
        runner.updater = Failing()
        with pytest.raises(OSError, match="broken"):
            runner.close()
        assert runner._model.closed
        assert runner._caches == []


class TestLogprobs:
    def test_only_those_who_ask_get_them(self):
        results = step(
            toy_runner(),
            greedy(0, (1, 2)),
            greedy(1, (3,), logprobs=0),
            greedy(2, (4, 4), logprobs=4),
        )
        assert results[0].logprobs == ()
        assert results[1].logprobs[0].top == ()
        for result, prompt in ((results[1], (3,)), (results[2], (4, 4))):
            expected = toy_logits(toy_hidden(prompt)).log_softmax(-1)[0]
            assert result.logprobs[0].token == result.tokens[0]
            assert result.logprobs[0].logprob == pytest.approx(
                float(expected[result.tokens[0]]), abs=1e-5
            )
        assert results[2].logprobs[0].top[0] == (
            results[2].tokens[0],
            results[2].logprobs[0].logprob,
        )


def score_prompt(runner, slot, prompt, cuts, *, sample=False, num_top=3):
    found, start = [], 0
    for size in cuts:
        tokens = prompt[start : start + size]
        last = start + size == len(prompt)
        (result,) = step(
            runner,
            chunk_of(
                slot,
                start=start,
                token_ids=tokens,
                num_prompt=len(prompt),
                sample=sample and last,
                prompt_logprobs=num_top,
            ),
        )
        found.append(result.prompt_logprobs)
        start += size
    return found


class TestPromptLogprobs:
    prompt = (5, 9, 33, 2, 2, 71, 8, 40, 13)

    def test_they_score_each_token_by_what_stands_before_it(self):
        (found,) = score_prompt(toy_runner(), 0, self.prompt, [9])
        assert [entry.token for entry in found] == list(self.prompt[1:])
        for position, entry in enumerate(found, start=1):
            expected = toy_logits(toy_hidden(self.prompt[:position])).log_softmax(-1)[0]
            assert entry.logprob == pytest.approx(float(expected[entry.token]), abs=1e-5)
            assert [token for token, _ in entry.top] == expected.topk(3).indices.tolist()

    @pytest.mark.parametrize("cuts", [[9], [1, 8], [8, 1], [3, 3, 3], [1] * 9, [2, 5, 1, 1]])
    def test_chunk_borders_do_not_show(self, cuts):
        (whole,) = score_prompt(toy_runner(), 0, self.prompt, [9])
        parts = score_prompt(toy_runner(), 7, self.prompt, cuts, sample=True)
        lengths = [size - (i == 0) for i, size in enumerate(cuts)]
        assert [len(part) for part in parts] == lengths
        assert tuple(entry for part in parts for entry in part) == whole

    def test_long_prompts_are_scored_in_blocks(self):
        model = ToyModel()
        caches = model.new_caches(num_pages=200, page_size=4, num_slots=20)
        runner = Runner(model, caches, capacity=CAPACITY, device=torch.device("cpu"))
        prompt = tuple(i * 7 % 90 for i in range(600))
        pages = tuple(range(150))
        sampling = chunk_of(prompt_logprobs=0).sampling
        (result,) = step(runner, Chunk(0, 0, prompt, pages, sampling, False, 600))
        assert model.logit_rows == [256, 256, 87]
        assert [entry.token for entry in result.prompt_logprobs] == list(prompt[1:])
        assert all(entry.top == () for entry in result.prompt_logprobs)

    def test_decoding_has_none(self):
        runner = toy_runner()
        score_prompt(runner, 0, self.prompt, [9], sample=True)
        (result,) = step(runner, chunk_of(start=9, token_ids=(3,), num_prompt=9, prompt_logprobs=3))
        assert result.prompt_logprobs is None
        assert result.tokens

    def test_several_sequences_and_samples_share_a_step(self):
        results = step(
            toy_runner(),
            chunk_of(0, token_ids=self.prompt, prompt_logprobs=1, logprobs=2),
            greedy(1, (4,), logprobs=1),
            chunk_of(2, token_ids=self.prompt[:4], prompt_logprobs=2, sample=False, num_prompt=9),
        )
        (whole,) = score_prompt(toy_runner(), 0, self.prompt, [9], num_top=2)
        assert [len(entry.top) for entry in results[0].prompt_logprobs] == [1] * 8
        assert results[2].prompt_logprobs == whole[:3]
        assert results[1].tokens[0] == expected_token((4,))
        assert len(results[0].logprobs[0].top) == 2
        assert len(results[1].logprobs[0].top) == 1

    def test_a_prompt_that_does_not_continue_is_refused(self):
        runner = toy_runner()
        score_prompt(runner, 0, self.prompt, [3], sample=False)
        late = chunk_of(start=5, token_ids=(1,), num_prompt=9, sample=False, prompt_logprobs=1)
        with pytest.raises(ValueError, match="the row before position 5 is gone"):
            step(runner, late)


class TestFailures:
    def test_a_failed_step_leaves_the_runner_usable(self):
        runner = toy_runner()
        step(runner, greedy(0, (1, 2, 3)), greedy(1, (7, 7), presence_penalty=1.0))
        poisoned = greedy(2, (4, ToyModel.poison))
        with pytest.raises(RuntimeError, match="poisoned"):
            step(runner, greedy(1, (8,), start=2, num_prompt=2, presence_penalty=1.0), poisoned)
        results = step(runner, greedy(0, (9,), start=3, num_prompt=3), greedy(2, (4, 5)))
        assert results[0].tokens[0] == expected_token((1, 2, 3, 9))
        assert results[1].tokens[0] == expected_token((4, 5))

    def test_a_slot_begins_anew_after_a_failure(self):
        runner = toy_runner()
        settings = {"temperature": 0.0, "frequency_penalty": 2.0, "repetition_penalty": 1.5}
        clean = generate(toy_runner(), 5, (3, 4), 6, **settings)
        generate(runner, 5, (3, 4, 1, 1, 6), 4, **settings)
        with pytest.raises(RuntimeError, match="poisoned"):
            step(runner, chunk_of(5, token_ids=(1, ToyModel.poison), **settings))
        assert generate(runner, 5, (3, 4), 6, **settings) == clean

    def test_a_scored_prompt_that_failed_can_be_asked_again(self):
        runner = toy_runner()
        prompt = TestPromptLogprobs.prompt
        score_prompt(runner, 0, prompt, [4])
        with pytest.raises(RuntimeError, match="poisoned"):
            step(runner, greedy(1, (ToyModel.poison,)))
        assert score_prompt(runner, 0, prompt, [4, 5]) == score_prompt(
            toy_runner(), 0, prompt, [4, 5]
        )

    def test_logits_that_are_not_finite_end_their_own_sequence(self, caplog):
        runner = toy_runner()
        results = step(runner, greedy(3, (ToyModel.broken,)), greedy(1, (1, 2), logprobs=1))
        assert results[0] == ChunkResult((), error="the model's logits are not finite")
        assert results[1].error is None
        assert results[1].tokens[0] == results[1].logprobs[0].token == expected_token((1, 2))
        assert "slots [3]" in caplog.text

    def test_a_step_in_which_nothing_is_finite_has_failed(self):
        runner = toy_runner()
        with pytest.raises(FloatingPointError, match=r"slots \[1, 3\]"):
            step(runner, greedy(3, (ToyModel.broken,)), greedy(1, (2, ToyModel.broken)))
        assert step(runner, greedy(1, (1, 2)))[0].tokens[0] == expected_token((1, 2))

    def test_a_scored_prompt_must_be_finite_too(self):
        prompt = (4, ToyModel.broken, 5)
        scoring = chunk_of(2, token_ids=prompt, sample=False, prompt_logprobs=1)
        results = step(toy_runner(), scoring, greedy(1, (1, 2)))
        assert "not finite" in results[0].error
        assert results[0].prompt_logprobs is None
        assert results[1].tokens[0] == expected_token((1, 2))
