from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kttrio.text import grammar, trial
from kttrio.text.gate import Way
from kttrio.text.grammar import Form, FormKind, Grammars, Spec
from kttrio.text.grammar_error import GrammarError
from kttrio.text.matcher import Matcher
from kttrio.text.reasoning import FORMATS, ReasoningSplitter, ReasoningStart
from kttrio.text.tokenizer import Tokenizer
from tests.text.walks import allowed, walk

CHAT = Path(__file__).parents[1] / "fixtures" / "qwen3_moe_chat"
FLAT = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}

OPEN = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/point"}},
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}
"""No word of what else may come, so nothing else does."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(CHAT)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.eos_ids)


def form(kind: FormKind, source: Any = "") -> Spec:
    text = source if isinstance(source, str) else json.dumps(source)
    return Spec(Form(kind, text, "response_format"))


def takes(grammars: Grammars, tokenizer: Tokenizer, spec: Spec, text: str) -> bool:
    """Whether the text is a whole answer."""
    matcher = grammars.compile(spec).open()
    try:
        matcher.advance(tokenizer.encode(text))
    except GrammarError:
        return False
    return bool(tokenizer.eos_ids.intersection(allowed(matcher.masks()[0])))


FORMS: list[tuple[FormKind, Any, list[str], list[str]]] = [
    ("json_object", "", ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", "{", ' {"a": 1}']),
    ("json_schema", FLAT, ['{"city":"x"}', '{\n  "city": "x",\n  "n": 2\n}'], ["{}", '{"n": 2}']),
    ("json_schema", OPEN, ['{"at": {"x": 1}}', "{}"], ['{"at": {"z": 1}}', '{"b": 1}']),
    ("json_schema", {"type": "object"}, ["{}", '{"b": 1}'], ["[]"]),
    ("json_schema", {"type": "integer", "minimum": 1}, ["1", "9" * 18], ["0", "9" * 20]),
    ("json_schema", True, ['{"a": 1}', "3"], ["x"]),
    ("regex", "[a-c]+/\n?", ["ab/", "c/\n"], ["/", "ab"]),
    ("regex", "^(yes|no)$", ["yes", "no"], ["yesno", "^yes$", ""]),
    ("regex", r"a\$", ["a$"], ["a"]),
    ("regex", r"^a\\$", ["a\\"], ["a\\$"]),
    ("choice", ["a", "ab", 'x\n"\\/é'], ["a", "ab", 'x\n"\\/é'], ["b", "aba", "x"]),
    ("ebnf", 'root ::= "a" b* # c\nb ::= [0-9]+ | "x-" "y"', ["a", "a12x-y"], ["", "ax"]),
    ("ebnf", r'root ::= [a-c\u00e9]{2,3} "\u00e9"', ["ébé"], ["é", "dbé"]),
    ("lark", 'start: "a" B\nB: /[0-9]+/', ["a12"], ["a", "12"]),
]


@pytest.mark.parametrize(("kind", "source", "right", "wrong"), FORMS)
def test_a_form_takes_what_it_should(
    grammars: Grammars,
    tokenizer: Tokenizer,
    kind: FormKind,
    source: Any,
    right: list[str],
    wrong: list[str],
):
    spec = form(kind, source)
    assert [text for text in right if not takes(grammars, tokenizer, spec, text)] == []
    assert [text for text in wrong if takes(grammars, tokenizer, spec, text)] == []


REFUSED: list[tuple[FormKind, Any, str]] = [
    ("json_schema", {"type": "object", "not": {}}, "not"),
    ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
    ("json_schema", {"type": "string", "format": "zip"}, "pattern: zip"),
    ("json_schema", {"$ref": "#/nowhere"}, "nowhere"),
    ("json_schema", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "anyOf"),
    ("json_schema", {"x-guidance": {"lenient": True}, "not": {}}, "not"),
    ("json_schema", "{", "not valid JSON"),
    ("json_schema", "[" * 5000, "nested too deeply"),
    ("json_schema", '{"items":' * 900 + "{}" + "}" * 900, "nested too deeply"),
    ("json_schema", "[1]", "must be an object"),
    ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ("regex", "a(", "unclosed group"),
    ("regex", "(?=a)", "look-around"),
    ("choice", [], "one string or more"),
    ("choice", [1], "must be a string"),
    ("choice", "x", "not valid JSON"),
    ("ebnf", 'root ::= "a" b', "'b' not found"),
    ("ebnf", 'start ::= "a"', "'root'"),
    ("ebnf", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "nested too deeply"),
    ("ebnf", "root ::= x\n" + "x ::= y\n" * 512, "513 rules"),
    ("ebnf", 'root ::= "\\', "range"),
    ("lark", "start: x", 'unknown name: "x"'),
    ("regex", "a" * grammar.lark.MAX_CHARS + "b", "characters long"),
]


@pytest.mark.parametrize(("kind", "source", "complaint"), REFUSED)
def test_what_cannot_be_enforced_is_refused(
    grammars: Grammars, kind: FormKind, source: Any, complaint: str
):
    for _ in range(2):  # the second time from memory
        with pytest.raises(GrammarError) as caught:
            grammars.compile(form(kind, source))
        assert complaint in str(caught.value)
        assert len(str(caught.value)) < 400
        assert "guidance" not in str(caught.value)


def chain(num: int) -> str:
    """Rules that each lead to the next."""
    return "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(num)) + f'r{num}: "a"'


BOMBS: list[tuple[FormKind, Any]] = [
    ("lark", chain(3000)),
    ("json_schema", {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(40)]}),
    ("regex", "a{100000}"),
    ("json_schema", {"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}),
    ("regex", "(" * 2000 + "a" + ")" * 2000),
]


@pytest.mark.parametrize(("kind", "source"), BOMBS)
def test_bombs_harm_nobody(
    grammars: Grammars,
    tokenizer: Tokenizer,
    kind: FormKind,
    source: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    begun = time.monotonic()
    with contextlib.suppress(GrammarError), monkeypatch.context() as patch:
        patch.setattr(trial, "SECONDS", 0.5)
        follow(grammars.compile(form(kind, source)).open(), num_tokens=20)
    assert time.monotonic() - begun < 20
    assert takes(grammars, tokenizer, form("regex", "a+"), "aa")


def follow(matcher: Matcher, num_tokens: int) -> None:
    for _ in range(num_tokens):
        matcher.advance(allowed(matcher.masks()[0])[:1])


def test_a_pattern_too_costly_as_it_goes_on_says_so(grammars: Grammars):
    compiled = grammars.compile(form("regex", "a" + "{1,9}" * 12))
    with pytest.raises(GrammarError, match="too many"):
        follow(compiled.open(), num_tokens=40)
    assert compiled.open().masks()[0], "those of others go on"


def test_only_the_end_follows_the_end(grammars: Grammars, tokenizer: Tokenizer):
    matcher = grammars.compile(form("choice", ["ab"])).open()
    matcher.advance(tokenizer.encode("ab"))
    assert set(allowed(matcher.masks()[0])) == tokenizer.eos_ids
    matcher.advance([min(tokenizer.eos_ids)])
    assert matcher.ended


def test_white_space_has_an_end(grammars: Grammars, tokenizer: Tokenizer):
    for before in ('{"city"', '{"city":', '{"city":"x"', "{"):
        assert not takes(grammars, tokenizer, form("json_schema", FLAT), before + " " * 200)
        matcher = grammars.compile(form("json_schema", FLAT)).open()
        matcher.advance(tokenizer.encode(before))
        for _ in range(40):
            blanks = [
                token
                for token in allowed(matcher.masks()[0])
                if tokenizer.token_bytes(token).isspace()
            ]
            if not blanks:
                break
            matcher.advance(blanks[:1])
        else:
            pytest.fail(f"a model can spin behind {before}")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_drafts_leave_no_trace(grammars: Grammars, tokenizer: Tokenizer, seed: int):
    random = Random(seed)
    compiled = grammars.compile(form("json_schema", FLAT))
    gate = Way(FORMATS["qwen3"], False, tokenizer.special_ids).gate(ReasoningStart.UNSAID)
    matcher, twin = compiled.open(gate), compiled.open(gate)
    text = random.choice(['<think>hm</think>\n\n{"city": "x", "n": 5}', '{"city":"ab"}'])
    output = [*tokenizer.encode(text), min(tokenizer.eos_ids)]
    place = 0
    while place < len(output):
        good = output[place : place + random.randint(0, 4)]
        drafts = [*good, random.randrange(tokenizer.vocab_size)]
        masks = matcher.masks(drafts)
        assert len(masks) == len(drafts) + 1
        for number, token in enumerate(good):
            assert masks[number] == twin.masks()[0]
            twin.advance([token])
        if not twin.ended:
            assert masks[len(good)] == twin.masks()[0]
        matcher.advance(good)
        place += len(good)
    assert matcher.ended == twin.ended


def test_a_token_that_may_not_come_is_an_error(grammars: Grammars, tokenizer: Tokenizer):
    matcher = grammars.compile(form("choice", ["ab"])).open()
    with pytest.raises(GrammarError):
        matcher.advance(tokenizer.encode("x"))


# Behind reasoning


@pytest.mark.parametrize("start", ReasoningStart)
@pytest.mark.parametrize("kind", ["json_schema", "regex", "choice"])
def test_the_content_is_in_form_however_the_output_begins(
    grammars: Grammars, tokenizer: Tokenizer, start: ReasoningStart, kind: FormKind
):
    sources = {"json_schema": FLAT, "regex": "[<th>]{3,9}|</think>x", "choice": ["<thin", "\nab"]}
    spec = form(kind, sources[kind])
    way = Way(FORMATS["qwen3"], False, tokenizer.special_ids)
    compiled, ended = grammars.compile(spec), 0
    for seed in range(20):
        text = walk(
            compiled.open(way.gate(start)), tokenizer, seed, ways_out=("</think>", "</", '"}')
        )
        if text is None:
            continue
        ended += 1
        splitter = ReasoningSplitter(way.format, start, calls=False, forced=True)
        pieces = [splitter.push(text), splitter.finish()]
        content = "".join(piece[1] for piece in pieces)
        assert takes(grammars, tokenizer, spec, content), (text, content)
    assert ended > 10


def test_reasoning_cannot_end_the_output(grammars: Grammars, tokenizer: Tokenizer):
    way = Way(FORMATS["qwen3"], False)
    matcher = grammars.compile(form("json_object")).open(way.gate(ReasoningStart.OPEN))
    matcher.advance(tokenizer.encode("Let me see"))
    may_come = set(allowed(matcher.masks()[0]))
    assert set(range(tokenizer.vocab_size)) - may_come == tokenizer.eos_ids


def test_newlines_before_the_answer_have_an_end(grammars: Grammars, tokenizer: Tokenizer):
    way = Way(FORMATS["qwen3"], False)
    matcher = grammars.compile(form("json_object")).open(way.gate(ReasoningStart.OPEN))
    matcher.advance(tokenizer.encode("hm</think>\n\n\n\n"))
    newline = tokenizer.encode("\n")[0]
    may_come = allowed(matcher.masks()[0])
    assert newline not in may_come
    assert tokenizer.encode("{")[0] in may_come


def test_an_answer_cannot_begin_with_what_is_dropped(grammars: Grammars):
    compiled = grammars.compile(form("regex", "\nfoo"))
    assert compiled.open().masks()[0]
    with pytest.raises(GrammarError, match="newline"):
        compiled.open(Way(FORMATS["qwen3"], False).gate(ReasoningStart.OPEN))


# Any schema

NAMES = st.sampled_from(["a", "b", "key", "ü", 'q"'])
SCHEMAS = st.recursive(
    st.one_of(
        st.sampled_from(
            [{"type": "boolean"}, {"type": "null"}, {"const": "x"}, {"enum": [1, "b"]}]
        ),
        st.builds(
            lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
            st.integers(-300, 300),
            st.integers(0, 500),
        ),
        st.builds(
            lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
            st.integers(0, 3),
            st.integers(0, 6),
        ),
        st.just({"type": "string", "pattern": "^[ab]{1,4}$"}),
    ),
    lambda inner: st.one_of(
        st.builds(
            lambda items, least, more: {
                "type": "array",
                "items": items,
                "minItems": least,
                "maxItems": least + more,
            },
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.builds(
            lambda properties, required: {
                "type": "object",
                "properties": properties,
                "required": [name for name in properties if name in required],
                "additionalProperties": False,
            },
            st.dictionaries(NAMES, inner, max_size=3),
            st.sets(NAMES),
        ),
        st.builds(lambda members: {"anyOf": members}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(SCHEMAS, st.integers(0, 1000))
def test_answers_follow_any_schema(
    grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], seed: int
):
    matcher = grammars.compile(form("json_schema", schema)).open()
    text = walk(matcher, tokenizer, seed, ways_out=('"', "}", "]"))
    assert text is not None
    jsonschema.validate(json.loads(text), schema)


# What is kept


def test_grammars_are_kept_but_not_for_ever(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grammar, "MAX_GRAMMARS", 2)
    grammars = Grammars(tokenizer, tokenizer.eos_ids)
    first = grammars.compile(form("choice", ["a"]))
    grammars.compile(form("choice", ["b"]))
    assert grammars.compile(form("choice", ["a"])) is first
    assert grammars.recall(form("choice", ["a"])) is first
    assert grammars.recall(form("choice", ["c"])) is None
    grammars.compile(form("choice", ["c"]))
    assert grammars.compile(form("choice", ["a"])) is first
    grammars.compile(form("choice", ["b"]))
    grammars.compile(form("choice", ["c"]))
    assert grammars.compile(form("choice", ["a"])) is not first


def test_the_vocabulary_is_read_once_and_in_advance(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    read: list[object] = []
    kind = grammar.Vocabulary
    monkeypatch.setattr(grammar, "Vocabulary", lambda *given: read.append(given) or kind(*given))
    grammars = Grammars(tokenizer, tokenizer.eos_ids)
    for _ in range(2):
        grammars.prepare()
    grammars.compile(form("choice", ["a"]))
    assert len(read) == 1


def test_a_model_without_an_end_is_held_to_nothing(tokenizer: Tokenizer):
    grammars = Grammars(tokenizer, frozenset())
    grammars.prepare()
    with pytest.raises(GrammarError, match="no end token"):
        grammars.compile(form("json_object"))
