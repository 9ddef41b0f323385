"""What an answer must look like: a form or tool calls that a request asks for, made into grammars.

Not here: the grammars' text (lark.py), their state while an answer is written (matcher.py), where
the answer begins (gate.py).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Literal, TypeVar

from llguidance import LLMatcher, LLParserLimits

from kttrio.text import entrance, lark
from kttrio.text.entrance import Turns
from kttrio.text.gate import Gate, Way
from kttrio.text.grammar_error import GrammarError, told
from kttrio.text.lark import Rules
from kttrio.text.matcher import Matcher
from kttrio.text.tokenizer import Tokenizer
from kttrio.text.tool_parsers import base as tool_parsers
from kttrio.text.tool_parsers.base import Tools
from kttrio.text.trial import Trial
from kttrio.text.vocabulary import Vocabulary

FormKind = Literal["json_object", "json_schema", "regex", "ebnf", "lark", "choice"]

MAX_GRAMMARS = 32
MAX_CACHED_CHARS = 4 << 20
MAX_SHARING = 16
MAX_LEXER_STATES = 20_000
"""30 MB of states that answers have met."""
MAX_ENTRANCES = 64
"""Places before an answer whose masks are kept; there are few that outputs come to."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a whole answer must be."""

    kind: FormKind
    source: str
    """The schema as JSON text, the pattern, the grammar, or the choices as a JSON array; empty for
    `json_object`."""
    field: str
    """Where it stands in the request's body, for complaints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcedCalls:
    """Calls of tools, as the parser of that name reads them."""

    parser: str
    tools: Tools
    names: tuple[str, ...]
    """Only these are called."""
    several: bool
    """One call or more; else exactly one."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What an answer must be: one of them is given; where both are, either will do."""

    form: Form | None = None
    calls: ForcedCalls | None = None


class Grammars:
    """A model's grammars. Threads may share it: once prepared, what it does takes milliseconds for
    grammars of real requests."""

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._special_tokens = {
            tokenizer.token_bytes(id).decode(): id for id in tokenizer.special_ids - end_ids
        }
        self._trial = Trial(
            {"max_lexer_states": MAX_LEXER_STATES}, self._special_tokens, tokenizer.vocab_size
        )
        self._lock = Lock()
        self._vocabulary: Vocabulary | None = None
        self._turns: dict[Way, Turns] = {}
        self._cache: OrderedDict[str, Grammar | str] = OrderedDict()  # or what is wrong with it

    def prepare(self) -> None:
        """Read the vocabulary now. That holds up every thread for a second where it has 150,000
        tokens, and else comes with the first grammar, when others' answers are on their way."""
        with suppress(GrammarError):  # who asks for a grammar is told
            self._read_vocabulary()

    def recall(self, spec: Spec) -> Grammar | None:
        """The grammar if it is kept: a matter of milliseconds. Raises GrammarError as `compile`."""
        return _sound(self._recall(_source(spec, self._special_tokens)))

    def compile(self, spec: Spec) -> Grammar:
        """Raises GrammarError: what is wrong with the request."""
        source = _source(spec, self._special_tokens)
        known = _sound(self._recall(source))
        if known is not None:
            return known
        complaint = self._try(source)
        found = told(complaint) if complaint else self._build(source)
        self._remember(source, found)
        return _sound(found)

    def _try(self, source: str) -> str:
        try:
            return self._trial.complaint(source)
        except TimeoutError as error:  # not to be remembered: the machine may be busy
            raise GrammarError(str(error)) from None

    def _build(self, source: str) -> Grammar:
        return Grammar(self._read_vocabulary(), source, self._turns)

    def _read_vocabulary(self) -> Vocabulary:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer, self._end_ids)
            return self._vocabulary

    def _recall(self, source: str) -> Grammar | str | None:
        with self._lock:
            if source in self._cache:
                self._cache.move_to_end(source)
            return self._cache.get(source)

    def _remember(self, source: str, grammar: Grammar | str) -> None:
        with self._lock:
            self._cache[source] = grammar
            while len(self._cache) > MAX_GRAMMARS or _size(self._cache) > MAX_CACHED_CHARS:
                self._cache.popitem(last=False)


class Grammar:
    """A compiled grammar. Threads may share it."""

    def __init__(self, vocabulary: Vocabulary, source: str, turns: dict[Way, Turns]) -> None:
        """`turns`: what is known of the vocabulary, added to. Raises GrammarError."""
        self._vocabulary = vocabulary
        self._source = source
        self._turns = turns
        self._entrances: dict[Gate, bytes] = {}
        self._lock = Lock()
        self._start = self._compile()
        self._num_opened = 0

    def open(self, gate: Gate | None = None) -> Matcher:
        """The state of one answer. `gate`: how its output leads to it; None: it is all answer.
        Raises GrammarError where there is none behind that gate."""
        if gate is not None and not any(self._entrance(entrance.last_place(gate.way))):
            raise GrammarError("it wants a newline first, which is dropped behind reasoning")
        with self._lock:
            # Those of one start share the states that they have met, which must not grow for ever.
            if self._num_opened == MAX_SHARING or self._start.is_error():
                self._start, self._num_opened = self._compile(), 0
            self._num_opened += 1
            grammar = self._start.deep_copy()
        return Matcher(self._vocabulary, grammar, gate, self._entrance)

    def _compile(self) -> LLMatcher:
        limits = LLParserLimits(
            max_lexer_states=MAX_LEXER_STATES,
            verbose_errors=False,
        )
        start = LLMatcher(self._vocabulary.words, self._source, log_level=0, limits=limits)
        start.compute_bitmask()
        if start.is_error():
            raise GrammarError(told(start.get_error()))
        return start

    def _entrance(self, gate: Gate) -> bytes:
        mask = self._entrances.get(gate)
        if mask is None:
            turns = self._turns.setdefault(gate.way, Turns(self._vocabulary, gate.way))
            mask = entrance.mask(gate, turns, self._vocabulary, self._start.deep_copy())
            if len(self._entrances) < MAX_ENTRANCES:
                self._entrances[gate] = mask
        return mask


T = TypeVar("T", Grammar, Grammar | None)


def _sound(found: T | str) -> T:
    """What is no complaint. Raises GrammarError."""
    if isinstance(found, str):
        raise GrammarError(found)
    return found


def _size(cache: Mapping[str, object]) -> int:
    return sum(map(len, cache))


def _source(spec: Spec, special_tokens: Mapping[str, int]) -> str:
    """The grammar as llguidance takes it. Raises GrammarError."""
    form = lark.of_form(spec.form.kind, spec.form.source) if spec.form else None
    if spec.calls is None:
        if form is None:
            raise ValueError("neither a form nor calls")
        return LLMatcher.grammar_from_lark(form)
    rules = Rules(special_tokens)
    calls = tool_parsers.shape(spec.calls.parser).write(
        spec.calls.tools, spec.calls.names, rules, several=spec.calls.several
    )
    start = "start: " + rules.add(calls)
    if form is None:
        return LLMatcher.grammar_from_lark(f"{start}\n{rules}")
    grammars = [
        {"lark_grammar": f"{start} | @form\n{rules}"},
        {"name": "form", "lark_grammar": form},
    ]
    return json.dumps({"grammars": grammars})
