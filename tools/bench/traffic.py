"""Which experts real requests use: models answer or read them, the recorder writes them down."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from torch import Tensor

from kttrio.config import EngineConfig, ModelConfig, RecordingConfig, RunnerConfig
from kttrio.engine.scheduler import Scheduler
from kttrio.experts.recording import read_counts
from kttrio.models.base import read_blueprint
from kttrio.request import GenerateRequest, SamplingParams
from kttrio.runner.build import build_runner
from kttrio.serve import DEMO_MODEL
from tools import synthetic
from tools.demo import corpus, tokens

# The layers, experts and choices of Qwen3-Next-80B-A3B, of which each is as small as can be.
SHAPE: dict[str, Any] = synthetic.config(layers=48, experts=512, hidden=64, intermediate=32) | {
    "num_experts_per_tok": 10,
    "full_attention_interval": 4,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
SHARD_LIMIT = 1_000_000_000
STEP_TOKENS = 32
RUNNING = 4
ANSWER_TOKENS = 64
PIECE = 256  # tokens of a text that are read together
SOURCES = Path(__file__).parents[2]
TEXTS = ("*.md", "kttrio/**/*.py", "cpp/**/*.h", "cpp/**/*.cpp")


class Traffic(NamedTuple):
    """What the experts of a model do for some requests."""

    steps: Tensor  # [steps, layers, experts] int64, how often each was chosen
    top_k: int


def demo_traffic(num_requests: int) -> Traffic:
    """The demo model answers questions, writes functions and calls tools."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    end = tokenizer.token_to_id(tokens.SPECIAL[2])
    prompts = [
        tokenizer.encode(tokens.render(_asked(talk), prompt=True)).ids
        for talk in corpus.conversations(1, num_requests)
    ]
    sampling = SamplingParams(ANSWER_TOKENS, 0, temperature=0.0, stop_token_ids=frozenset({end}))
    return record(DEMO_MODEL, prompts, sampling)


def synthetic_traffic(num_requests: int) -> Traffic:
    """A model of random weights, shaped like Qwen3-Next, reads pieces of this project's own texts
    and sources, in any order."""
    with TemporaryDirectory() as folder:
        directory = Path(folder, "model")
        synthetic.write_checkpoint(directory, SHAPE, shard_limit=SHARD_LIMIT)
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        pieces = list(_pieces(tokenizer))
        prompts = random.Random(0).sample(pieces, min(num_requests, len(pieces)))
        return record(directory, prompts, SamplingParams(1, 0, temperature=0.0))


def record(model: Path, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> Traffic:
    """These prompts, and the model's answers."""
    engine = EngineConfig(
        chunked_prefill_size=STEP_TOKENS,
        max_running_requests=RUNNING,
        max_queued_requests=len(prompts),
        context_length=1024,
    )
    with TemporaryDirectory() as folder:
        recording = RecordingConfig("per_pass", -1, Path(folder))
        runner = build_runner(
            RunnerConfig(ModelConfig(model=model), engine=engine, recording=recording)
        )
        recorder, scheduler = runner.recorder, Scheduler(runner.capacity, engine)
        assert recorder is not None
        recorder.start()
        for number, prompt in enumerate(prompts):
            scheduler.submit(GenerateRequest(str(number), tuple(prompt), sampling))
        while (plan := scheduler.plan()) is not None:
            scheduler.commit(plan, runner.step(plan))
        file = recorder.dump()
        assert file is not None
        runner.close()
        return Traffic(read_counts(file), read_blueprint(model).shape.top_k)


def _asked(talk: corpus.Conversation) -> corpus.Conversation:
    """The same up to the last thing that was not said by the model."""
    last = max(i for i, message in enumerate(talk.messages) if message["role"] != "assistant")
    return corpus.Conversation(talk.messages[: last + 1], talk.tools)


def _pieces(tokenizer: Tokenizer) -> Iterator[list[int]]:
    for pattern in TEXTS:
        for file in sorted(SOURCES.glob(pattern)):
            ids = tokenizer.encode(file.read_text("utf-8")).ids
            yield from (ids[at : at + PIECE] for at in range(0, len(ids), PIECE))
