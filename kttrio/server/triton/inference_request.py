"""From named values to a request: inputs, parameters, and the fields in `sampling_parameters`.

Values come as tensors or as JSON (loose.py says how it may be spelled). Which there are is known to
inputs.py; how either arrives is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from kttrio.server.asking.forms import read_form, schema_form
from kttrio.server.asking.sampling import check_ids, sampling_options
from kttrio.server.bodies import parse_object
from kttrio.server.errors import BadRequestError
from kttrio.server.requests import Options, TextRequest
from kttrio.server.schema.kinds import check_type, refuse
from kttrio.server.schema.records import read
from kttrio.server.triton.inputs import FLAGS, KINDS, KNOWN, OUTPUTS, SCORED, SPECS, Inputs
from kttrio.server.triton.loose import alone, spelled
from kttrio.server.triton.tensors import BYTES, Tensor
from kttrio.text.grammar import Form

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
