"""Histograms count as Prometheus does, and steps by what they compute."""

from __future__ import annotations

from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from kttrio.engine.measures import Histogram, Measures
from kttrio.plan import Chunk, ChunkResult, StepPlan, StepResult
from kttrio.request import SamplingParams

SAMPLING = SamplingParams(max_tokens=9, seed=0)


def chunk(
    start: int, num_tokens: int, num_prompt: int, *, sample: bool = True, drafts: int = 0
) -> Chunk:
    return Chunk(0, start, (1,) * num_tokens, (0,), SAMPLING, sample, num_prompt, drafts)


PROMPT = chunk(0, 7, 7)
PART = chunk(0, 5, 9, sample=False)
ONE_TOKEN = chunk(0, 1, 1)
AGAIN = chunk(8, 4, 5)  # a preempted one's outputs, computed as if they were its prompt
DECODE = chunk(7, 1, 7)
DRAFTED = chunk(7, 3, 7, drafts=2)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5))))
def test_a_value_counts_where_it_is_at_most_the_bound(values: list[tuple[float, int]]) -> None:
    bounds = (1, 2.5, 10, 50)
    histogram = Histogram(bounds)
    for value, times in values:
        histogram.add(value, times)
    for number, bound in enumerate(bounds):
        wanted = sum(times for value, times in values if value <= bound)
        assert sum(histogram.counts[: number + 1]) == wanted
    assert sum(histogram.counts) == sum(times for _, times in values)
    assert abs(histogram.sum - sum(value * times for value, times in values)) < 1e-6


def measured(*chunks: Chunk, long: Chunk | None = None, passed: bool = False) -> Measures:
    measures = Measures()
    found = ChunkResult((1,)) if passed else None
    result = StepResult((ChunkResult((1,)),) * len(chunks), 0.004, found)
    measures.note_step(StepPlan(chunks, long), result)
    return measures


def test_prompts_are_told_from_decodes() -> None:
    for chunks, num_prompt in (
        ((DECODE, DECODE), 0),
        ((DECODE, DRAFTED), 0),
        ((DECODE, PROMPT, PART), 12),
        ((DECODE, ONE_TOKEN), 1),
        ((DRAFTED, AGAIN), 4),
    ):
        measures = measured(*chunks)
        assert measures.num_prompt_tokens == num_prompt
        kind = measures.prefills if num_prompt else measures.decodes
        assert sum(measures.prefills.counts) + sum(measures.decodes.counts) == 1
        assert kind.counts[bisect_left(kind.bounds, 0.004)] == 1


def test_a_long_prompt_counts_when_it_is_through() -> None:
    assert measured(DECODE, long=PROMPT).num_prompt_tokens == 0
    assert sum(measured(DECODE, long=PROMPT).prefills.counts) == 1
    assert measured(DECODE, long=PROMPT, passed=True).num_prompt_tokens == 7
