"""Inference as KServe v2 and Triton's LLM backends know it: a model with named tensors in and out,
what it tells of itself, and how an answer becomes tensors.

The same over HTTP and gRPC: descriptions are plain values under the names that the protocol's JSON
has. Inputs are read in inference_request.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kttrio.request import TokenLogprob
from kttrio.server.answering import collect, open_intake
from kttrio.server.decoding import Answer, Delta
from kttrio.server.errors import ApiError, BadRequestError
from kttrio.server.ids import new_id
from kttrio.server.inference_counts import Timing
from kttrio.server.prompting import Prepared, prepare_text
from kttrio.server.scores import finite
from kttrio.server.state import AppState, installed_version
from kttrio.server.triton.inference_request import Asked
from kttrio.server.triton.inputs import OUTPUTS, SPECS, TensorSpec
from kttrio.server.triton.tensors import BYTES, Tensor, vector
from kttrio.text.tokenizer import Tokenizer

VERSION = "1"
"""The only one of the model: weights change with the server."""
PLATFORM = "kttrio"
EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
    "generate",
)
RUNNING = "None"
"""The finish reason of an answer that goes on, as vLLM's backend writes it."""


# What the server and its model tell of themselves.


def server_metadata() -> dict[str, Any]:
    return {"name": "kttrio", "version": installed_version(), "extensions": list(EXTENSIONS)}


def check_model(state: AppState, name: str, version: str = "") -> None:
    """Raise the 404 for a model or version that is not served. An empty version is any."""
    if name != state.model.name:
        message = f"Request for unknown model: '{name[:200]}' is not found"
        raise ApiError(404, f"{message}; this server has '{state.model.name}'.")
    if version not in ("", VERSION):
        raise ApiError(
            404,
            f"Request for unknown model: '{name[:200]}' version {version[:20]} is not found; "
            f"there is version {VERSION}.",
        )


def model_metadata(state: AppState) -> dict[str, Any]:
    return {
        "name": state.model.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [_described(spec) for spec in SPECS.values()],
        "outputs": [_described(spec) for spec in OUTPUTS],
    }


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def model_config(state: AppState) -> dict[str, Any]:
    """Triton's ModelConfig. No batches: the engine makes its own, token by token."""
    return {
        "name": state.model.name,
        "platform": "",
        "backend": PLATFORM,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": [{**_configured(spec), "optional": spec.optional} for spec in SPECS.values()],
        "output": [_configured(spec) for spec in OUTPUTS],
        "instance_group": [{"name": state.model.name, "kind": "KIND_MODEL", "count": 1}],
        "model_transaction_policy": {"decoupled": True},
    }


def _configured(spec: TensorSpec) -> dict[str, Any]:
    datatype = "STRING" if spec.datatype == BYTES else spec.datatype
    return {"name": spec.name, "data_type": f"TYPE_{datatype}", "dims": list(spec.shape)}


def model_statistics(state: AppState) -> list[dict[str, Any]]:
    """One entry: the model's."""
    return [{"name": state.model.name, "version": VERSION, **state.inferences.fields()}]


def repository_index(state: AppState, *, only_ready: bool) -> list[dict[str, Any]]:
    """The model, and whether it is ready."""
    trouble = state.trouble
    if trouble is not None and only_ready:
        return []
    told = (
        {"state": "READY", "reason": ""}
        if trouble is None
        else {"state": "UNAVAILABLE", "reason": trouble}
    )
    return [{"name": state.model.name, "version": VERSION, **told}]


def refuse_change() -> ApiError:
    """Why a model is neither loaded nor unloaded. No 503: trying again would not help."""
    return BadRequestError(
        "Models are not loaded or unloaded while the server runs: it serves the one that it was "
        "started with."
    )


# One request.


class Row(NamedTuple):
    """News of one choice."""

    text: str = ""
    finish: str | None = None
    scores: Sequence[TokenLogprob] = ()


@dataclass(slots=True)
class Tally:
    """What was told of a choice so far."""

    num_tokens: int = 0
    logprob: float = 0.0


@dataclass(slots=True)
class Inference:
    """A request that may run: its sequences, and how their news become output tensors.

    A tensor has one element for each choice; those that say nothing just now say nothing in it.
    """

    asked: Asked
    prepared: Prepared
    tokenizer: Tokenizer
    timing: Timing
    _tallies: list[Tally] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tallies = [Tally() for _ in self.prepared.decoders]

    @property
    def is_plain(self) -> bool:
        """Whether a response is one string: it may then be written without tensors."""
        return self.asked.outputs == ("text_output",) and len(self._tallies) == 1

    def whole(self, answers: Sequence[Answer]) -> list[Tensor]:
        """The only response to a request that is answered as a whole."""
        echo = self.asked.echo
        rows = [Row(echo + one.text, one.finish, one.logprobs) for one in answers]
        return self._respond(rows)

    def part(self, choice: int, delta: Delta) -> list[Tensor]:
        """The response that one choice's news make."""
        rows = [Row()] * len(self._tallies)
        rows[choice] = Row(delta.text, delta.finish, delta.logprobs)
        return self._respond(rows)

    def _respond(self, rows: Sequence[Row]) -> list[Tensor]:
        told = [tally.num_tokens for tally in self._tallies]
        for tally, row, decoder in zip(self._tallies, rows, self.prepared.decoders, strict=True):
            tally.num_tokens = decoder.num_tokens
            tally.logprob += sum(finite(score.logprob) for score in row.scores)
        return [self._output(name, rows, told) for name in self.asked.outputs]

    def _output(self, name: str, rows: Sequence[Row], told: Sequence[int]) -> Tensor:
        """`told`: of each choice, the tokens in earlier responses."""
        tallies = self._tallies
        match name:
            case "text_output":
                return _texts(name, [row.text for row in rows])
            case "finish_reason":
                return _texts(name, [row.finish or RUNNING for row in rows])
            case "logprobs":
                return _texts(name, [json.dumps(self._told(row.scores)) for row in rows])
            case "cumulative_logprob" | "cum_log_probs":
                return vector(name, "FP32", [tally.logprob for tally in tallies])
            case "output_log_probs":
                return _scores(name, rows)
            case "num_output_tokens":
                news = [one.num_tokens - old for one, old in zip(tallies, told, strict=True)]
                return vector(name, "UINT32", news)
            case "sequence_length":
                return vector(name, "INT32", [tally.num_tokens for tally in tallies])
            case "num_input_tokens":
                return vector(name, "UINT32", [self.prepared.num_prompt_tokens])
            case _:  # batch_index: there is only one prompt
                return vector(name, "INT32", [0])

    def _told(self, scores: Sequence[TokenLogprob]) -> list[dict[int, Any]]:
        """For each token a mapping from ids, as vLLM's backend has it: its own and the best ones.
        A rank is known of the best alone."""
        found = []
        for score in scores:
            best = enumerate(score.top, start=1)
            told = {score.token: self._score(score.token, score.logprob, None)}
            found.append(told | {t: self._score(t, logprob, rank) for rank, (t, logprob) in best})
        return found

    def _score(self, token: int, logprob: float, rank: int | None) -> dict[str, Any]:
        text = self.tokenizer.piece(token)
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": text}


def _texts(name: str, texts: Sequence[str]) -> Tensor:
    """Half characters, which a model may write, become question marks."""
    return vector(name, BYTES, [text.encode(errors="replace") for text in texts])


def _scores(name: str, rows: Sequence[Row]) -> Tensor:
    """The log-probability of each new token; choices with fewer are filled up with 0."""
    longest = max(len(row.scores) for row in rows)
    values: list[float] = []
    for row in rows:
        values += [finite(score.logprob) for score in row.scores]
        values += [0.0] * (longest - len(row.scores))
    return Tensor(name, "FP32", (len(rows), longest), tuple(values))


async def prepare(state: AppState, asked: Asked, num_bytes: int) -> Inference:
    """Check and encode a request of `num_bytes`. Raises ApiError."""
    timing = state.inferences.begin()
    with timing.preparing():
        intake = open_intake(state, new_id("infer-"), num_bytes)
        prepared = await prepare_text(state.model, asked.request, intake)
    return Inference(asked, prepared, state.model.tokenizer, timing)


async def infer(state: AppState, inference: Inference) -> list[Tensor]:
    """Run a request to its end, which also gathers a stream. Raises ApiError."""
    with inference.timing.answering():
        answers, _ = await collect(state, inference.prepared)
        inference.timing.mark_answered()
        return inference.whole(answers)
