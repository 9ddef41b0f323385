from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kttrio.text.gate import Way
from kttrio.text.grammar import ForcedCalls, Form, Grammars, Spec
from kttrio.text.grammar_error import GrammarError
from kttrio.text.reasoning import FORMATS, ReasoningSplitter, ReasoningStart
from kttrio.text.tokenizer import Tokenizer
from kttrio.text.tool_parsers.base import (
    Content,
    ToolCallArguments,
    ToolCallStart,
    open_parser,
)
from tests.text.walks import allowed, walk

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHATS = {
    # parser -> reasoning parser, a checkpoint of the family
    "hermes": ("qwen3", "qwen3_moe_chat"),
    "qwen3_coder": ("qwen3", "qwen3_5_moe_chat"),
    "glm45": ("glm45", "glm4_moe_chat"),
    "deepseekv3": ("deepseek-r1", "deepseek_v3_chat"),
    "deepseekv31": ("deepseek-v3", "deepseek_v3_chat"),
    "deepseekv32": ("deepseek-v3", "deepseek_v32_chat"),
    "kimi_k2": ("kimi", "kimi_k2_chat"),
    "minimax_m2": ("minimax", "minimax_m2_chat"),
}
TAGGED = ("qwen3_coder", "glm45", "deepseekv32", "minimax_m2")
WAYS_OUT = (
    *("</parameter>", "\n</parameter>\n", "</arg_value>", "</｜DSML｜parameter>\n"),
    *('"}', '"', "}", "</tool_call>", "</invoke>\n", "</｜DSML｜invoke>\n", "</think>"),
    *("<|tool_calls_section_end|>", "<｜tool▁calls▁end｜>", "</｜DSML｜function_calls>"),
)
EVERYTHING: dict[str, Any] = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "n": {"type": "integer"},
        "x": {"type": "number", "minimum": 0, "maximum": 5},
        "u": {"enum": ["c", "f\n", "null"]},
        "b": {"type": "boolean"},
        "o": {
            "type": "object",
            "properties": {"k": {"type": "string", "maxLength": 4}},
            "required": ["k"],
            "additionalProperties": False,
        },
        "m": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
        "l": {"type": ["array", "string"], "items": {"type": "integer"}, "maxItems": 3},
        "r": {"$ref": "#/$defs/R"},
        "p": {"type": "string", "pattern": "^[a-c]{2,5}$"},
        "d": {"type": "string", "format": "date"},
        "e": {"enum": [1, "two", None, 2.5, True]},
        "y": {},
    },
    "required": ["path", "u", "m"],
    "$defs": {"R": {"type": "array", "items": {"enum": ["q", "w"]}, "maxItems": 2}},
}
TEXT = {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_x", "parameters": EVERYTHING}},
    {"type": "function", "function": {"name": "now"}},
    {"type": "function", "function": {"name": "g.h-1", "parameters": TEXT}},
]
SCHEMAS = {"get_x": EVERYTHING, "now": {"type": "object", "maxProperties": 0}, "g.h-1": TEXT}

Open = Callable[[str], tuple[Tokenizer, Grammars]]


@pytest.fixture(scope="module")
def model() -> Open:
    kept: dict[str, tuple[Tokenizer, Grammars]] = {}

    def of(parser: str) -> tuple[Tokenizer, Grammars]:
        if parser not in kept:
            tokenizer = Tokenizer.load(FIXTURES / CHATS[parser][1])
            kept[parser] = tokenizer, Grammars(tokenizer, tokenizer.eos_ids)
        return kept[parser]

    return of


def calls_of(parser: str, text: str, tools: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """The calls of a text that is nothing else, as our parser reads it."""
    reader = open_parser(parser, tools)
    calls: list[list[str]] = []
    for piece in reader.push(text) + reader.finish():
        if isinstance(piece, ToolCallStart):
            calls.append([piece.name, ""])
        elif isinstance(piece, ToolCallArguments):
            calls[-1][1] += piece.json_fragment
        elif isinstance(piece, Content):
            assert not piece.text.strip(), text
    return [(name, json.loads(arguments)) for name, arguments in calls]


def tool(parameters: Any, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def forced(parser: str, *tools: dict[str, Any], several: bool = False) -> Spec:
    names = tuple(tool["function"]["name"] for tool in tools)
    return Spec(calls=ForcedCalls(parser=parser, tools=tools, names=names, several=several))


@pytest.mark.parametrize("parser", CHATS)
def test_forced_calls_are_valid_as_our_parser_reads_them(model: Open, parser: str):
    tokenizer, grammars = model(parser)
    grammar = grammars.compile(forced(parser, *TOOLS, several=True))
    texts = [walk(grammar.open(), tokenizer, seed, ways_out=WAYS_OUT) for seed in range(16)]
    ended = [calls_of(parser, text, TOOLS) for text in texts if text is not None]
    assert len(ended) > 6
    assert {name for calls in ended for name, _ in calls} == set(SCHEMAS)
    assert any(len(calls) > 1 for calls in ended)
    for calls in ended:
        assert calls
        for name, arguments in calls:
            jsonschema.validate(arguments, SCHEMAS[name])


@pytest.mark.parametrize("parser", CHATS)
def test_one_call_is_one(model: Open, parser: str):
    tokenizer, grammars = model(parser)
    grammar = grammars.compile(forced(parser, TOOLS[1]))
    for seed in range(8):
        text = walk(grammar.open(), tokenizer, seed, ways_out=WAYS_OUT)
        assert text is not None
        assert calls_of(parser, text, TOOLS) == [("now", {})]


@pytest.mark.parametrize("parser", CHATS)
@pytest.mark.parametrize("start", [ReasoningStart.OPEN, ReasoningStart.UNSAID])
def test_calls_come_behind_reasoning(model: Open, parser: str, start: ReasoningStart):
    tokenizer, grammars = model(parser)
    way = Way(FORMATS[CHATS[parser][0]], calls=True)
    grammar, ended = grammars.compile(forced(parser, TOOLS[1])), 0
    for seed in range(12):
        text = walk(grammar.open(way.gate(start)), tokenizer, seed, ways_out=WAYS_OUT)
        if text is not None:
            ended += 1
            splitter = ReasoningSplitter(way.format, start, forced=True)
            content = splitter.push(text)[1] + splitter.finish()[1]
            assert calls_of(parser, content, TOOLS) == [("now", {})]
    assert ended > 5


@pytest.mark.parametrize("parser", CHATS)
def test_calls_or_a_form(model: Open, parser: str):
    tokenizer, grammars = model(parser)
    form = Form("json_schema", '{"type": "integer", "maximum": 99, "minimum": 0}', "f")
    spec = Spec(form, forced(parser, TOOLS[1]).calls)
    grammar = grammars.compile(spec)
    number = grammar.open()
    number.advance(tokenizer.encode("42"))
    assert tokenizer.eos_ids <= set(allowed(number.masks()[0]))
    texts = [walk(grammar.open(), tokenizer, seed, ways_out=WAYS_OUT) for seed in range(20)]
    read = [calls_of(parser, text, TOOLS) for text in texts if text and not text.isdigit()]
    assert read
    assert all(calls == [("now", {})] for calls in read)


@pytest.mark.parametrize("parser", ["kimi_k2", "hermes", "deepseekv32"])
def test_tags_are_special_tokens_or_text(model: Open, parser: str):
    tokenizer, grammars = model(parser)
    text = walk(grammars.compile(forced(parser, TOOLS[1])).open(), tokenizer, 1)
    assert text is not None
    spelled = [token for byte in text.encode() for token in [byte]]
    by_byte = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
    for tokens in (tokenizer.encode(text), [by_byte[bytes([byte])] for byte in spelled]):
        matcher = grammars.compile(forced(parser, TOOLS[1])).open()
        matcher.advance(tokens)
        assert set(allowed(matcher.masks()[0])) == tokenizer.eos_ids


REFUSED = [
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"allOf": [{"type": "string"}, {"maxLength": 5}]}, "allOf"),
    ({"type": "string", "not": {"const": "x"}}, "not"),
    ({"type": "string", "format": "zip"}, "format"),
    ({"enum": []}, "enum"),
    ({"$ref": "#/properties/a"}, "$ref"),
    ({"type": "object", "not": {}}, "not"),
]


@pytest.mark.parametrize("parser", TAGGED)
@pytest.mark.parametrize(("schema", "keyword"), REFUSED)
def test_what_cannot_be_enforced_is_refused_by_name(
    model: Open, parser: str, schema: Any, keyword: str
):
    _, grammars = model(parser)
    parameters = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(GrammarError) as caught:
        grammars.compile(forced(parser, tool(parameters)))
    assert keyword in str(caught.value)


@pytest.mark.parametrize("parser", TAGGED)
def test_what_stands_beside_the_parameters_is_refused_by_name(model: Open, parser: str):
    _, grammars = model(parser)
    with pytest.raises(GrammarError, match=r"the tool 'f': 'minProperties'"):
        grammars.compile(forced(parser, tool({"type": "object", "minProperties": 1})))


@pytest.mark.parametrize("parser", CHATS)
def test_a_name_that_no_call_can_have_is_refused(model: Open, parser: str):
    _, grammars = model(parser)
    with pytest.raises(GrammarError, match="its name"):
        grammars.compile(forced(parser, tool(TEXT, "a<b")))


@pytest.mark.parametrize("parser", TAGGED)
def test_text_may_be_anything_that_does_not_end_it(model: Open, parser: str):
    tokenizer, grammars = model(parser)
    text = walk(grammars.compile(forced(parser, TOOLS[2])).open(), tokenizer, 3, ways_out=WAYS_OUT)
    value = 'if a < b && c > d: </para </function> "\\n" <b>\n\n  ü 5 null {} </html'
    (_, arguments), *_ = calls_of(parser, text or "", TOOLS)
    matcher = grammars.compile(forced(parser, TOOLS[2])).open()
    changed = (text or "").replace(arguments["s"], value)
    matcher.advance(tokenizer.encode(changed))
    assert set(allowed(matcher.masks()[0])) == tokenizer.eos_ids
    assert calls_of(parser, changed, TOOLS) == [("g.h-1", {"s": value})]
