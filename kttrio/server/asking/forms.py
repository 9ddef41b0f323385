"""What an answer must look like, in all the words that OpenAI's, vLLM's and SGLang's clients have
for it. One `Form` comes out; how it is kept is known to text/grammar.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kttrio.server.asking.sampling import SamplingFields
from kttrio.server.errors import BadRequestError
from kttrio.server.schema.kinds import Boolean, Either, Many, Object, Tagged, Text, refuse
from kttrio.server.schema.records import Nested, given, ignored, refused
from kttrio.text.grammar import Form

MAX_WORDS = 1000
SCHEMA = Either({str: Text(1), dict: Object()})
"""A JSON schema, or its text."""
WORDS = Many(Text(1), least=1, most=MAX_WORDS)
NO_SPACES = "the grammar sets how much white space there may be"
NO_TAGS = "use 'response_format', or 'tools' with a 'tool_choice'"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFormat:
    """Any text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectFormat:
    """A JSON object; some clients give its schema here."""

    schema: dict[str, Any] | None = given(Object(), "of the object; without it any object")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedSchema:
    """A schema as OpenAI has it."""

    name: str = given(Text(1), "of the schema", required=True)
    schema: dict[str, Any] = given(Object(), "JSON Schema of the answer", required=True)
    description: None = ignored("the model sees no schema; say it in a message")
    strict: None = ignored("answers always follow the schema")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaFormat:
    """JSON that a schema describes."""

    json_schema: NamedSchema = given(Nested(NamedSchema), "the schema", required=True)


RESPONSE_FORMAT = Tagged(
    "type",
    {
        "text": Nested(TextFormat),
        "json_object": Nested(ObjectFormat),
        "json_schema": Nested(SchemaFormat),
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """vLLM's object for all of it."""

    json: dict[str, Any] | str | None = given(SCHEMA, "JSON Schema of the answer")
    regex: str | None = given(Text(1), "pattern of the whole answer")
    choice: tuple[str, ...] | None = given(WORDS, "the answer is one of these")
    grammar: str | None = given(Text(1), "EBNF (with '::=') or Lark")
    json_object: bool = given(Boolean(), "any JSON object", default=False)
    structural_tag: None = refused(NO_TAGS)
    whitespace_pattern: None = refused(NO_SPACES)
    disable_any_whitespace: None = refused(NO_SPACES)
    disable_fallback: None = ignored("there is one way to keep a grammar")
    disable_additional_properties: None = refused("say it in the schema")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidedFields(SamplingFields):
    """A body's form of the answer: one of these, or none."""

    response_format: TextFormat | ObjectFormat | SchemaFormat | None = given(
        RESPONSE_FORMAT, "text, json_object or json_schema"
    )
    regex: str | None = given(Text(1), "pattern of the whole answer")
    ebnf: str | None = given(Text(1), "grammar of the answer")
    json_schema: dict[str, Any] | str | None = given(SCHEMA, "JSON Schema of the answer")
    structured_outputs: StructuredOutputs | None = given(
        Nested(StructuredOutputs), "vLLM's object: json, regex, choice, grammar or json_object"
    )
    guided_json: dict[str, Any] | str | None = given(SCHEMA, "JSON Schema of the answer")
    guided_regex: str | None = given(Text(1), "pattern of the whole answer")
    guided_choice: tuple[str, ...] | None = given(WORDS, "the answer is one of these")
    guided_grammar: str | None = given(Text(1), "EBNF (with '::=') or Lark")
    guided_json_object: bool = given(Boolean(), "any JSON object", default=False)
    structural_tag: None = refused(NO_TAGS)
    guided_whitespace_pattern: None = refused(NO_SPACES)
    guided_decoding_backend: None = ignored("there is one")
    grammar: None = refused("use 'ebnf'")


def read_form(fields: GuidedFields) -> Form | None:
    """The form that a body asks for. Raises BadRequestError, also for more than one."""
    forms = [*_from_format(fields), *_from_fields(fields), *_from_object(fields)]
    if len(forms) > 1:
        names = " and ".join(f"'{form.field}'" for form in forms)
        raise BadRequestError(f"Give one form of the answer, not {names}.", forms[1].field)
    return forms[0] if forms else None


def _from_format(fields: GuidedFields) -> Iterator[Form]:
    wanted = fields.response_format
    if isinstance(wanted, SchemaFormat):
        place = "response_format.json_schema.schema"
        yield schema_form(wanted.json_schema.schema, place)
    elif isinstance(wanted, ObjectFormat):
        yield (
            Form("json_object", "", "response_format")
            if wanted.schema is None
            else schema_form(wanted.schema, "response_format.schema")
        )


def _from_fields(fields: GuidedFields) -> Iterator[Form]:
    for name in ("json_schema", "guided_json"):
        if (schema := getattr(fields, name)) is not None:
            yield schema_form(schema, name)
    for name in ("regex", "guided_regex"):
        if (pattern := getattr(fields, name)) is not None:
            yield Form("regex", pattern, name)
    if fields.ebnf is not None:
        yield Form("ebnf", fields.ebnf, "ebnf")
    if fields.guided_grammar is not None:
        yield grammar_form(fields.guided_grammar, "guided_grammar")
    if fields.guided_choice is not None:
        yield choice_form(fields.guided_choice, "guided_choice")
    if fields.guided_json_object:
        yield Form("json_object", "", "guided_json_object")


def _from_object(fields: GuidedFields) -> Iterator[Form]:
    asked = fields.structured_outputs
    if asked is None:
        return
    place = "structured_outputs"
    if asked.json is not None:
        yield schema_form(asked.json, f"{place}.json")
    if asked.regex is not None:
        yield Form("regex", asked.regex, f"{place}.regex")
    if asked.choice is not None:
        yield choice_form(asked.choice, f"{place}.choice")
    if asked.grammar is not None:
        yield grammar_form(asked.grammar, f"{place}.grammar")
    if asked.json_object:
        yield Form("json_object", "", f"{place}.json_object")


def schema_form(schema: dict[str, Any] | str, field: str) -> Form:
    """A JSON schema, or its text. Raises BadRequestError for text that is none."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            refuse(field, f"must be a JSON schema: {error!s:.200}")
        if not isinstance(schema, dict):
            refuse(field, "must be a JSON schema, which is an object")
    return Form("json_schema", json.dumps(schema, ensure_ascii=False), field)


def grammar_form(source: str, field: str) -> Form:
    """EBNF is known by its `::=`, which Lark does not have."""
    return Form("ebnf" if "::=" in source else "lark", source, field)


def choice_form(words: tuple[str, ...], field: str) -> Form:
    """One of some words."""
    return Form("choice", json.dumps(words, ensure_ascii=False), field)
