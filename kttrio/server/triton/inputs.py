"""The tensors that a generating model takes and gives, in the union of the names that clients of
Triton's LLM backends know.

How a request is made of them is known to inference_request.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, NamedTuple

from kttrio.server.asking.forms import GuidedFields
from kttrio.server.asking.sampling import MAX_CHOICES, MAX_LOGPROBS, MAX_STOPS
from kttrio.server.prompting import DEFAULT_TEXT_TOKENS
from kttrio.server.schema.kinds import (
    Boolean,
    Either,
    Integer,
    Kind,
    Number,
    Object,
    OneOf,
    Strings,
    Text,
)
from kttrio.server.schema.records import Stance, given, ignored, refused
from kttrio.server.schema.tokens import MAX_ID, TokenIds
from kttrio.server.triton.loose import LISTS
from kttrio.server.triton.tensors import BYTES

UINT64_MAX = 2**64 - 1
GUIDES = ("json", "json_schema", "regex", "ebnf_grammar")
ONLY_TEXT = "prompts are text alone"
NO_ADAPTERS = "this server has no adapters"
NO_LOGITS = "use 'return_logprobs'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs(GuidedFields):
    """The inputs of one request. Those inherited are also what `sampling_parameters` may hold."""

    text_input: str = given(Text(), "the prompt, as it is: no chat template", required=True)
    stream: bool = given(Boolean(), "an answer in pieces, where it can be", default=False)
    max_tokens: int | None = given(
        Integer(0), f"most tokens of the answer; without it {DEFAULT_TEXT_TOKENS}"
    )
    logprobs: int | None = given(Integer(0, MAX_LOGPROBS), "best tokens in the output 'logprobs'")
    seed: int | None = given(Integer(-(2**63), UINT64_MAX), "the same seed, the same answer")
    sampling_parameters: str | dict[str, Any] | None = given(
        Either({str: Text(), dict: Object()}),
        "a JSON object of sampling fields, which may stand outside of it as well",
    )
    exclude_input_in_output: bool | None = given(
        Boolean(), "leave the prompt out of the output; without it a stream does, and nothing else"
    )

    return_finish_reason: bool = given(Boolean(), "output 'finish_reason'", default=False)
    return_cumulative_logprob: bool = given(Boolean(), "'cumulative_logprob'", default=False)
    return_logprobs: bool = given(Boolean(), "output 'logprobs', as JSON", default=False)
    return_num_input_tokens: bool = given(Boolean(), "'num_input_tokens'", default=False)
    return_num_output_tokens: bool = given(Boolean(), "'num_output_tokens'", default=False)
    return_log_probs: bool = given(
        Boolean(), "outputs 'cum_log_probs' and 'output_log_probs'", default=False
    )

    stop_words: tuple[str, ...] = given(Strings(MAX_STOPS), "the same as 'stop'", default=())
    min_length: int = given(Integer(0), "the same as 'min_tokens'", default=0)
    num_return_sequences: int = given(Integer(1, MAX_CHOICES), "the same as 'n'", default=1)
    random_seed: int | None = given(Integer(-(2**63), UINT64_MAX), "the same as 'seed'")
    end_id: int | None = given(Integer(-1, MAX_ID), "one more token that ends the answer; -1: none")
    guided_decoding_guide_type: str | None = given(OneOf(GUIDES), "what the guide is")
    guided_decoding_guide: str | None = given(
        Text(), "the schema, pattern or grammar of the answer; 'json' has none"
    )

    beam_width: None = refused("answers are sampled", harmless=(1, [1]))
    best_of: None = refused("use 'n'", harmless=(1,))
    bad_words: None = refused("use 'logit_bias' with their tokens", harmless=([""],))
    image: None = refused(ONLY_TEXT)
    image_input: None = refused(ONLY_TEXT)
    image_bytes_input: None = refused(ONLY_TEXT)
    image_url_input: None = refused(ONLY_TEXT)
    video_bytes_input: None = refused(ONLY_TEXT)
    multi_modal_data: None = refused(ONLY_TEXT)
    decoder_text_input: None = refused("the model has no encoder")
    prompt_embedding_table: None = refused(ONLY_TEXT)
    prompt_vocab_size: None = refused(ONLY_TEXT)
    prompt_table_extra_id: None = refused(ONLY_TEXT)
    lora_name: None = refused(NO_ADAPTERS)
    lora_task_id: None = refused(NO_ADAPTERS)
    lora_weights: None = refused(NO_ADAPTERS)
    lora_config: None = refused(NO_ADAPTERS)
    embedding_bias_words: None = refused("use 'logit_bias'")
    embedding_bias_weights: None = refused("use 'logit_bias'")
    return_context_logits: None = refused(NO_LOGITS)
    return_generation_logits: None = refused(NO_LOGITS)
    return_perf_metrics: None = refused("/metrics tells them")
    return_kv_cache_reuse_stats: None = refused("/metrics tells them")
    num_draft_tokens: None = refused("the server makes its drafts itself")
    use_draft_logits: None = refused("the server makes its drafts itself")
    sequence_id: None = refused("no request remembers another one")
    return_token_ids: None = refused("the outputs are text")  # type: ignore[assignment]
    len_penalty: None = refused("it belongs to beam search", harmless=(1,))

    pad_id: None = ignored("nothing is padded")
    early_stopping: None = ignored("it belongs to beam search")
    timeout: None = ignored("no request is dropped because it waited")


class TensorSpec(NamedTuple):
    """A tensor as the model's metadata tells it; -1 stands for any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = True


FLAGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "return_finish_reason": ("finish_reason",),
        "return_cumulative_logprob": ("cumulative_logprob",),
        "return_logprobs": ("logprobs",),
        "return_num_input_tokens": ("num_input_tokens",),
        "return_num_output_tokens": ("num_output_tokens",),
        "return_log_probs": ("cum_log_probs", "output_log_probs"),
    }
)
"""The outputs that an input asks for."""
OUTPUTS = (
    TensorSpec("text_output", BYTES, (-1,)),
    TensorSpec("finish_reason", BYTES, (-1,)),
    TensorSpec("cumulative_logprob", "FP32", (-1,)),
    TensorSpec("logprobs", BYTES, (-1,)),
    TensorSpec("num_input_tokens", "UINT32", (1,)),
    TensorSpec("num_output_tokens", "UINT32", (-1,)),
    TensorSpec("cum_log_probs", "FP32", (-1,)),
    TensorSpec("output_log_probs", "FP32", (-1, -1)),
    TensorSpec("sequence_length", "INT32", (-1,)),
    TensorSpec("batch_index", "INT32", (1,)),
)
SCORED = frozenset({"cumulative_logprob", "logprobs", "cum_log_probs", "output_log_probs"})
"""Outputs that need log-probabilities."""


def _input_specs() -> Iterator[TensorSpec]:
    for one in fields(Inputs):
        told = one.metadata
        if told["stance"] is Stance.DONE:
            shape = (-1,) if isinstance(told["kind"], LISTS) else (1,)
            datatype = _datatype(one.name, told["kind"])
            yield TensorSpec(one.name, datatype, shape, not told["required"])


def _datatype(name: str, kind: Kind) -> str:
    """What is neither number nor boolean comes as text, which is JSON where it is no string."""
    if name in ("seed", "random_seed"):
        return "UINT64"
    words = {Integer: "INT32", TokenIds: "INT32", Number: "FP32", Boolean: "BOOL"}
    return words.get(type(kind), BYTES)


SPECS: Mapping[str, TensorSpec] = MappingProxyType(
    {spec.name: spec for spec in sorted(_input_specs(), key=lambda spec: spec.optional)}
)
"""The inputs that are served; those that must be given come first."""
KNOWN = frozenset(one.name for one in fields(Inputs))
KINDS: Mapping[str, Kind] = MappingProxyType(
    {one.name: one.metadata["kind"] for one in fields(Inputs) if "kind" in one.metadata}
)
