"""From named values to a request, in the names of each of Triton's LLM backends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kttrio.server.errors import BadRequestError
from kttrio.server.requests import Options
from kttrio.server.triton.inference_request import Asked, ask, ask_tensors
from kttrio.server.triton.inputs import OUTPUTS, SPECS
from kttrio.server.triton.tensors import BYTES, Tensor, vector
from kttrio.text.grammar import Form

VOCAB = 1000
SCHEMA = '{"type": "object"}'


def asked(**values: Any) -> Asked:
    """With the values as parameters, of which numbers may be strings."""
    return ask({"text_input": "Hi"}, values, vocab_size=VOCAB)


def options(**values: Any) -> Options:
    return asked(**values).request.options


def refusal(**values: Any) -> str:
    with pytest.raises(BadRequestError) as caught:
        asked(**values)
    return caught.value.message


def test_nothing_but_a_prompt() -> None:
    found = asked()
    assert found.request.prompts == ("Hi",)
    assert found.request.options == Options()
    assert (found.echo, found.outputs, found.stream) == ("Hi", ("text_output",), False)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": ["5"], "temperature": "0.5"}, {"max_tokens": 5, "temperature": 0.5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_length": 3}, {"min_tokens": 3}),
        ({"min_length": 3, "min_tokens": [3]}, {"min_tokens": 3}),
        ({"num_return_sequences": 2}, {"n": 2}),
        ({"random_seed": 2**64 - 1}, {"seed": 2**64 - 1}),
        ({"stop_words": ["a", ""]}, {"stop": ("a",)}),
        ({"stop_words": ""}, {}),
        ({"stop_words": [["a", "b"]]}, {"stop": ("a", "b")}),
        ({"bad_words": "", "pad_id": 2, "end_id": 2}, {"stop_token_ids": (2,)}),
        ({"bad_words": [""], "beam_width": [1], "best_of": 1}, {}),
        ({"end_id": -1}, {"ignore_eos": True}),
        ({"end_id": 4, "stop_token_ids": [3]}, {"stop_token_ids": (3, 4)}),
        (
            {"sampling_param_max_tokens": 7, "sampling_param_top_p": 0.5},
            {"max_tokens": 7, "top_p": 0.5},
        ),
        ({"logit_bias": '{"5": -1}'}, {"logit_bias": ((5, -1.0),)}),
        ({"unheard_of": [1, 2]}, {}),
        ({"max_tokens": None}, {}),
    ],
)
def test_names_of_options(values: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert options(**values) == Options(**wanted)


def test_sampling_parameters_hold_json_with_strings_for_numbers() -> None:
    text = {"temperature": "0.1", "top_p": "0.95", "max_tokens": "100", "stop": ["\n"], "n": 2}
    wanted = Options(temperature=0.1, top_p=0.95, max_tokens=100, stop=("\n",), n=2)
    assert options(sampling_parameters=json.dumps(text)) == wanted
    assert options(sampling_parameters=text) == wanted
    assert options(sampling_parameters=[json.dumps(text)], temperature=0.1) == wanted
    assert options(sampling_parameters="") == Options()


@pytest.mark.parametrize(
    "text",
    ["[]", "5", "{", '{"a": NaN}', '{"temperature": 1e999}', '{"stop": "\\ud800"}', "[" * 9999],
)
def test_other_sampling_parameters_are_refused(text: str) -> None:
    assert refusal(sampling_parameters=text)


def test_what_is_said_twice_must_be_the_same() -> None:
    assert "'max_tokens' is given twice" in refusal(max_tokens=1, sampling_param_max_tokens=2)
    assert "'seed' is given twice" in refusal(seed=1, random_seed=2)
    text = json.dumps({"temperature": 0})
    assert "'temperature' is given twice" in refusal(temperature=1, sampling_parameters=text)
    deep, other = _deep(), _deep()
    with pytest.raises(BadRequestError, match="too deeply"):
        ask({"beam_width": deep}, {"beam_width": other}, vocab_size=VOCAB)


def _deep() -> Any:
    value: Any = 1
    for _ in range(5000):
        value = [value, 2]
    return value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beam_width", 2),
        ("best_of", 2),
        ("bad_words", "no"),
        ("image", "aGk="),
        ("lora_task_id", 7),
        ("prompt_embedding_table", [1.0, 2.0]),
        ("embedding_bias_words", ["a"]),
        ("return_context_logits", True),
        ("use_beam_search", True),
        ("sequence_id", 3),
        ("temperature", 3),
        ("temperature", "hot"),
        ("max_tokens", -1),
        ("max_tokens", [1, 2]),
        ("stop_token_ids", [VOCAB]),
        ("end_id", -2),
        ("end_id", VOCAB),
        ("text_input", ["a", "b"]),
        ("text_input", 5),
        ("n", 1000),
        ("logprobs", 21),
        ("guided_decoding_guide", SCHEMA),
        ("guided_decoding_guide_type", "xml"),
        ("stream", "perhaps"),
    ],
)
def test_what_is_not_served_is_refused_by_name(name: str, value: object) -> None:
    assert f"'{name}'" in refusal(**{name: value})


def test_a_prompt_is_required() -> None:
    with pytest.raises(BadRequestError, match="'text_input' is missing"):
        ask({"max_tokens": 5}, {}, vocab_size=VOCAB)
    with pytest.raises(BadRequestError, match="'text_input' is missing"):
        ask({"sampling_parameters": '{"text_input": "Hi"}'}, {}, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("stream", "exclude", "echo"),
    [
        (False, None, "Hi"),
        (False, False, "Hi"),
        (False, True, ""),
        (True, None, ""),
        (True, True, ""),
    ],
)
def test_only_a_whole_answer_begins_with_its_prompt(
    stream: bool, exclude: bool | None, echo: str
) -> None:
    found = asked(stream=stream, exclude_input_in_output=exclude)
    assert (found.echo, found.stream) == (echo, stream)


def test_a_stream_never_begins_with_its_prompt() -> None:
    assert "'exclude_input_in_output'" in refusal(stream=True, exclude_input_in_output=False)


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (
            {"guided_decoding_guide_type": "json"},
            Form("json_object", "", "guided_decoding_guide_type"),
        ),
        (
            {"guided_decoding_guide_type": ["json_schema"], "guided_decoding_guide": [SCHEMA]},
            Form("json_schema", SCHEMA, "guided_decoding_guide"),
        ),
        (
            {"guided_decoding_guide_type": "regex", "guided_decoding_guide": r"\d+"},
            Form("regex", r"\d+", "guided_decoding_guide"),
        ),
        (
            {"guided_decoding_guide_type": "ebnf_grammar", "guided_decoding_guide": "root ::= 'a'"},
            Form("ebnf", "root ::= 'a'", "guided_decoding_guide"),
        ),
        (
            {"sampling_parameters": '{"structured_outputs": {"choice": ["a", "b"]}}'},
            Form("choice", '["a", "b"]', "structured_outputs.choice"),
        ),
        ({"guided_choice": ["a", "b"]}, Form("choice", '["a", "b"]', "guided_choice")),
    ],
)
def test_forms_of_the_answer(values: dict[str, Any], form: Form) -> None:
    assert options(**values).form == form


@pytest.mark.parametrize(
    "values",
    [
        {"guided_decoding_guide_type": "json", "guided_decoding_guide": SCHEMA},
        {"guided_decoding_guide_type": "json_schema"},
        {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "[]"},
        {"guided_decoding_guide_type": "json", "regex": "a"},
    ],
)
def test_bad_guides(values: dict[str, Any]) -> None:
    assert "guided_decoding_guide" in refusal(**values)


def test_flags_and_names_ask_for_outputs() -> None:
    flagged = asked(return_finish_reason=True, return_log_probs="true")
    names = ("text_output", "finish_reason", "cum_log_probs", "output_log_probs")
    assert flagged.outputs == names
    assert flagged.request.options.logprobs == 0
    named = ask(
        {"text_input": "Hi", "logprobs": 3},
        {},
        outputs=["logprobs", "text_output"],
        vocab_size=VOCAB,
    )
    assert named.outputs == ("logprobs", "text_output")
    assert named.request.options.logprobs == 3
    assert options(logprobs=3).logprobs is None


@pytest.mark.parametrize("outputs", [["nothing"], ["text_output", "text_output"]])
def test_bad_outputs(outputs: list[str]) -> None:
    with pytest.raises(BadRequestError):
        ask({"text_input": "Hi"}, {}, outputs=outputs, vocab_size=VOCAB)


PROMPT = vector("text_input", BYTES, [b"Hi"])


def test_tensors_and_parameters_together() -> None:
    found = ask_tensors(
        [PROMPT, Tensor("top_p", "FP64", (1, 1), (0.5,)), vector("temperature", "INT32", [1])],
        {"max_tokens": "4", "priority": 3},
        vocab_size=VOCAB,
    )
    assert found.request.options == Options(top_p=0.5, temperature=1.0, max_tokens=4)


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (vector("text_inputs", BYTES, [b"Hi"]), "'text_inputs' is no input"),
        (vector("max_tokens", "FP32", [5.0]), "'max_tokens' must be INT32, not FP32"),
        (vector("max_tokens", BYTES, [b"5"]), "'max_tokens' must be INT32, not BYTES"),
        (vector("stream", "INT32", [1]), "'stream' must be BOOL, not INT32"),
        (vector("stop", BYTES, [b"\xff"]), "'stop' must be UTF-8"),
        (vector("max_tokens", "INT32", []), "'max_tokens' must be an integer"),
        (vector("max_tokens", "INT32", [1, 2]), "'max_tokens' must be an integer"),
        (vector("temperature", "FP32", [float("nan")]), "'temperature'"),
        (vector("image", BYTES, [b"x"]), "'image' is not supported"),
        (PROMPT, "'text_input' is given twice"),
    ],
)
def test_bad_tensors(tensor: Tensor, complaint: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        ask_tensors([PROMPT, tensor], {}, vocab_size=VOCAB)
    assert complaint in caught.value.message


def test_specs_name_what_clients_know() -> None:
    assert next(iter(SPECS)) == "text_input"
    assert [name for name, spec in SPECS.items() if not spec.optional] == ["text_input"]
    types = {
        "text_input": (BYTES, (1,)),
        "stream": ("BOOL", (1,)),
        "sampling_parameters": (BYTES, (1,)),
        "exclude_input_in_output": ("BOOL", (1,)),
        "max_tokens": ("INT32", (1,)),
        "temperature": ("FP32", (1,)),
        "seed": ("UINT64", (1,)),
        "stop_words": (BYTES, (-1,)),
        "guided_decoding_guide": (BYTES, (1,)),
    }
    assert {name: (SPECS[name].datatype, SPECS[name].shape) for name in types} == types
    assert "beam_width" not in SPECS
    assert OUTPUTS[0].name == "text_output"
