"""The tensors that a generating model takes, in the union of the names that the clients of Triton's
LLM backends know: what each may be, and the request that they make together.

Values come as tensors or as JSON (schema/loose.py says how it may be spelled). How either arrives
is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from kttrio.server.asking.forms import GuidedFields, read_form, schema_form
from kttrio.server.asking.sampling import MAX_CHOICES, MAX_STOPS, check_ids, sampling_options
from kttrio.server.bodies import parse_object
from kttrio.server.errors import BadRequestError
from kttrio.server.prompting import DEFAULT_TEXT_TOKENS
from kttrio.server.requests import Options, TextRequest
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
    check_type,
    refuse,
)
from kttrio.server.schema.loose import LISTS, alone, spelled
from kttrio.server.schema.records import Stance, given, ignored, read, refused
from kttrio.server.schema.tokens import MAX_ID, TokenIds
from kttrio.server.triton.tensors import BYTES, Tensor
from kttrio.text.grammar import Form

MAX_LOGPROBS = 20
UINT64_MAX = 2**64 - 1
PREFIX = "sampling_param_"
"""What TensorRT-LLM's LLM API puts before the names of sampling parameters."""
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "stop_words": "stop",
        "min_length": "min_tokens",
        "num_return_sequences": "n",
        "random_seed": "seed",
    }
)
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


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was read: what to generate, and which outputs to write, in order."""

    request: TextRequest
    echo: str
    """What the text begins with."""
    outputs: tuple[str, ...]

    @property
    def stream(self) -> bool:
        return self.request.options.stream


def ask_tensors(
    inputs: Sequence[Tensor],
    parameters: Mapping[str, Any],
    *,
    outputs: Sequence[str] | None = None,
    vocab_size: int,
) -> Asked:
    """The request that tensors make, beside parameters that may stand for more of them. Raises
    BadRequestError."""
    values: dict[str, Any] = {}
    for tensor in inputs:
        if tensor.name in values:
            refuse(tensor.name, "is given twice")
        values[tensor.name] = alone(_value(tensor))
    return ask(values, parameters, outputs=outputs, vocab_size=vocab_size)


def _value(tensor: Tensor) -> list[Any]:
    """The elements as JSON would have them. Raises BadRequestError."""
    name = tensor.name.removeprefix(PREFIX)
    if name not in KNOWN:
        refuse(tensor.name, "is no input of this model: see its metadata")
    spec = SPECS.get(name)
    if spec is not None and not _fits(tensor.datatype, spec.datatype):
        refuse(tensor.name, f"must be {spec.datatype}, not {tensor.datatype}")
    if tensor.datatype != BYTES:
        return list(tensor.values)
    try:
        return [value.decode() for value in tensor.values]
    except UnicodeDecodeError:
        refuse(tensor.name, "must be UTF-8")


def _fits(given_type: str, wanted: str) -> bool:
    """Numbers may come in other sizes, and whole ones where fractions may."""
    if wanted in (BYTES, "BOOL"):
        return given_type == wanted
    whole = "INT" in given_type
    return whole or (wanted == "FP32" and given_type.startswith("FP"))


def ask(
    values: Mapping[str, Any],
    parameters: Mapping[str, Any],
    *,
    outputs: Sequence[str] | None = None,
    vocab_size: int,
) -> Asked:
    """The request that named values make, together with parameters, in which strings may stand for
    numbers. `outputs`: by name, in order; None: the text, and those that flags ask for. Raises
    BadRequestError."""
    try:
        inputs = read(Inputs, _gathered(values, parameters))
    except RecursionError:
        raise BadRequestError("An input is nested too deeply.") from None
    named = _outputs(inputs) if outputs is None else _checked(outputs)
    if inputs.stream and inputs.exclude_input_in_output is False:
        refuse("exclude_input_in_output", "must not be false in a stream")
    echoes = not inputs.stream and not inputs.exclude_input_in_output
    request = TextRequest(_options(inputs, named, vocab_size), (inputs.text_input,))
    return Asked(request, inputs.text_input if echoes else "", named)


def _gathered(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All values under the names that the fields have."""
    gathered: dict[str, Any] = {}
    for name, value in values.items():
        _note(gathered, name.removeprefix(PREFIX), value, words=False)
    for name, value in parameters.items():
        _note(gathered, name.removeprefix(PREFIX), value, words=True)
    for name, value in _sampling_parameters(gathered).items():
        _note(gathered, name, value, words=True)
    for alias, name in ALIASES.items():
        _note(gathered, name, gathered.get(alias), words=False)
    return gathered


def _note(values: dict[str, Any], name: str, value: Any, *, words: bool) -> None:
    """Keep a known value as its kind reads it. Two names for one thing, or two places, must say the
    same."""
    if name not in KNOWN or value is None:
        return
    if (kind := KINDS.get(name)) is not None:
        value = spelled(kind, value, name, words=words)
    if values.setdefault(name, value) != value:
        refuse(name, "is given twice, with different values")


def _sampling_parameters(values: dict[str, Any]) -> dict[str, Any]:
    name = "sampling_parameters"
    text = values.pop(name, None) or {}
    if isinstance(text, str):
        text = parse_object(text.encode(errors="replace"), what=f"'{name}'")
    check_type(text, dict, "an object", name)
    return {key: value for key, value in text.items() if key not in ("text_input", name)}


def _outputs(inputs: Inputs) -> tuple[str, ...]:
    """The text, and what flags ask for."""
    flagged = [name for flag, names in FLAGS.items() if getattr(inputs, flag) for name in names]
    return ("text_output", *flagged)


def _checked(outputs: Sequence[str]) -> tuple[str, ...]:
    names = [spec.name for spec in OUTPUTS]
    for name in outputs:
        if name not in names:
            refuse(name, f"is no output of this model; it has {', '.join(names)}")
    if len(set(outputs)) < len(outputs):
        refuse("outputs", "must name each output once")
    return tuple(outputs)


def _options(inputs: Inputs, outputs: tuple[str, ...], vocab_size: int) -> Options:
    options = sampling_options(inputs, vocab_size=vocab_size)
    ends = [] if inputs.end_id in (None, -1) else [inputs.end_id]
    check_ids(ends, vocab_size=vocab_size, path="end_id")
    scores = (inputs.logprobs or 0) if SCORED.intersection(outputs) else None
    return replace(
        options,
        stream=inputs.stream,
        max_tokens=inputs.max_tokens,
        logprobs=scores,
        form=_form(inputs),
        ignore_eos=options.ignore_eos or inputs.end_id == -1,
        stop_token_ids=(*options.stop_token_ids, *ends),
        return_token_ids=False,  # refused above
    )


def _form(inputs: Inputs) -> Form | None:
    """The one form of the answer, in whichever words."""
    guided, form = _guided(inputs), read_form(inputs)
    if guided and form:
        message = f"Give one form of the answer, not '{guided.field}' and '{form.field}'."
        raise BadRequestError(message, guided.field)
    return guided or form


def _guided(inputs: Inputs) -> Form | None:
    """TensorRT-LLM's way to ask for one."""
    kind, guide = inputs.guided_decoding_guide_type, inputs.guided_decoding_guide
    name = "guided_decoding_guide"
    if kind is None:
        if guide:
            refuse(name, "needs a 'guided_decoding_guide_type'")
        return None
    if kind == "json":
        if guide:
            refuse(name, "must be empty where its type is 'json'; 'json_schema' takes a schema")
        return Form("json_object", "", f"{name}_type")
    if not guide:
        refuse(name, "is missing", "missing_required_parameter")
    if kind == "json_schema":
        return schema_form(guide, name)
    return Form("regex" if kind == "regex" else "ebnf", guide, name)
