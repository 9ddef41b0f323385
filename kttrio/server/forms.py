"""What the answers to a request are held to: its form, the calls that it forces, or either.

Not here: the grammars themselves (text/grammar.py), and the threads that follow them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kttrio.request import Constraint, GenerateRequest
from kttrio.server.constraints import Constraints
from kttrio.server.errors import BadRequestError
from kttrio.server.outputs import chat_skipped_ids, reasoning_start
from kttrio.server.requests import ChatRequest, Options
from kttrio.server.served_model import ServedModel
from kttrio.text.gate import Gate, Way
from kttrio.text.grammar import ForcedCalls, Grammar, Grammars, Spec
from kttrio.text.grammar_error import GrammarError
from kttrio.text.matcher import Matcher


async def chat_constraints(
    model: ServedModel, request: ChatRequest, prompt: str, constraints: Constraints
) -> Sequence[Constraint]:
    """One for each answer to this rendered prompt; none where the model may say what it likes.
    Raises ApiError."""
    spec = chat_spec(model, request)
    if spec is None:
        return ()
    gate = _gate(model, request, prompt)
    return await _open(constraints, model.grammars, spec, [gate] * request.options.n)


async def text_constraints(
    model: ServedModel, options: Options, constraints: Constraints, *, count: int
) -> Sequence[Constraint]:
    """One for each of `count` texts, which are nothing but answer; else as for a chat."""
    if options.form is None:
        return ()
    _check_end(options, options.form.field)
    return await _open(constraints, model.grammars, Spec(options.form), [None] * count)


def held_to(
    constraints: Sequence[Constraint], sequences: Sequence[GenerateRequest]
) -> Sequence[GenerateRequest]:
    """The sequences, each with its constraint, where there are any."""
    if not constraints:
        return sequences
    return [
        replace(sequence, constraint=constraint)
        for sequence, constraint in zip(sequences, constraints, strict=True)
    ]


def chat_spec(model: ServedModel, request: ChatRequest) -> Spec | None:
    """Where a form is asked for tools may still be called in its place, unless they must be."""
    form = request.options.form
    if request.forced_calls:
        _check_end(request.options, "tool_choice")
        return Spec(calls=_calls(model, request, request.forced_calls))
    if form is None:
        return None
    _check_end(request.options, form.field)
    names = tuple(tool["function"]["name"] for tool in request.tools)
    return Spec(form, _calls(model, request, names) if names else None)


def _calls(model: ServedModel, request: ChatRequest, names: tuple[str, ...]) -> ForcedCalls:
    """Tools for which there is no parser have been refused."""
    return ForcedCalls(
        parser=model.tool_call_parser or "",
        tools=request.tools,
        names=names,
        several=request.parallel_tool_calls,
    )


def _check_end(options: Options, field: str) -> None:
    """Refuse to go on behind the end of what `field` asks for."""
    if options.ignore_eos:
        raise BadRequestError(
            f"'ignore_eos' cannot be combined with '{field}': such an answer has an end.",
            "ignore_eos",
            "invalid_value",
        )


def _gate(model: ServedModel, request: ChatRequest, prompt: str) -> Gate | None:
    """How the answer is reached; None: at once."""
    thinks, start = model.reasoning_format, reasoning_start(model, request, prompt)
    if thinks is None or start is None:
        return None
    return Way(thinks, bool(request.tools), chat_skipped_ids(model, request)).gate(start)


async def _open(
    constraints: Constraints, grammars: Grammars, spec: Spec, gates: Sequence[Gate | None]
) -> Sequence[Constraint]:
    def opened(grammar: Grammar) -> list[Matcher]:
        return [grammar.open(gate) for gate in gates]

    def recall() -> list[Matcher] | None:
        grammar = grammars.recall(spec)
        return None if grammar is None else opened(grammar)

    try:
        return await constraints.open(lambda: opened(grammars.compile(spec)), recall=recall)
    except GrammarError as error:
        field = spec.form.field if spec.form else "tools"
        raise BadRequestError(f"'{field}': {error}", field, "invalid_value") from error
