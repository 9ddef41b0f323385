"""How an answer is read: what in it is reasoning, calls or text, and what its client sees of that.

Not here: what the answer is held to (forms.py), though both go by the same beginning.
"""

from __future__ import annotations

from dataclasses import replace

from kttrio.server.decoding import Decoder, View
from kttrio.server.requests import ChatRequest, Options, ReasoningView
from kttrio.server.served_model import ServedModel
from kttrio.text.detokenizer import open_detokenizer
from kttrio.text.output import OutputPipeline, skipped_ids
from kttrio.text.reasoning import ReasoningSplitter, ReasoningStart
from kttrio.text.stops import StopStrings
from kttrio.text.tool_parsers.base import ToolParser, open_parser


def reasoning_start(model: ServedModel, request: ChatRequest, prompt: str) -> ReasoningStart | None:
    """How the answer to this rendered prompt begins; None: with itself, nothing comes before."""
    thinks = model.reasoning_format
    if thinks is None:
        return None
    start = thinks.start(prompt, said=request.said)
    return None if request.said is not None and start is ReasoningStart.CLOSED else start


def chat_skipped_ids(model: ServedModel, request: ChatRequest) -> frozenset[int]:
    """Tokens that leave no text in the answers to a chat."""
    if not request.options.skip_special_tokens:
        return frozenset()
    tags = model.reasoning_format.tags if model.reasoning_format else ()
    return skipped_ids(model.tokenizer, kept_tags=tags, calls=bool(request.tools))


def chat_decoder(model: ServedModel, request: ChatRequest, prompt: str) -> Decoder:
    """For one answer to this rendered prompt."""
    parser = model.tool_call_parser if request.tools else None
    pipeline = _pipeline(
        model,
        request.options,
        chat_skipped_ids(model, request),
        splitter=_splitter(model, request, prompt),
        tools=open_parser(parser, request.tools) if parser else None,
    )
    view = replace(_view(model, request.options), reasoning=request.reasoning)
    return Decoder(pipeline, one_call=not request.parallel_tool_calls, view=view)


def text_decoder(model: ServedModel, options: Options) -> Decoder:
    """For one text, all of which is answer."""
    skips = options.skip_special_tokens
    skip_ids = skipped_ids(model.tokenizer, calls=False) if skips else frozenset()
    return Decoder(_pipeline(model, options, skip_ids), view=_view(model, options))


def _splitter(model: ServedModel, request: ChatRequest, prompt: str) -> ReasoningSplitter | None:
    """None where all of the output is text for the client."""
    thinks, start = model.reasoning_format, reasoning_start(model, request, prompt)
    if thinks is None or start is None or request.reasoning is ReasoningView.IN_TEXT:
        return None
    forced = bool(request.forced_calls or request.options.form)
    return ReasoningSplitter(thinks, start, calls=bool(request.tools), forced=forced)


def _view(model: ServedModel, options: Options) -> View:
    """What the client wants to see beside text, reasoning and calls."""
    hidden = model.tokenizer.special_ids if options.skip_special_tokens else frozenset()
    ends = model.end_ids | frozenset(options.stop_token_ids)
    kept = ends - hidden if options.keep_stop else frozenset()
    return View(kept_stops=kept, token_ids=options.return_token_ids)


def _pipeline(
    model: ServedModel,
    options: Options,
    skip_ids: frozenset[int],
    *,
    splitter: ReasoningSplitter | None = None,
    tools: ToolParser | None = None,
) -> OutputPipeline:
    stops = StopStrings(options.stop, include_in_output=options.keep_stop) if options.stop else None
    return OutputPipeline(
        open_detokenizer(model.tokenizer, skip_ids=skip_ids),
        stops=stops,
        reasoning=splitter,
        tools=tools,
    )
