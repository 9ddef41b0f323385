"""From a checked request to sequences: the chat template, token ids, sampling, the context check.

All of it happens before the first byte of an answer, so that a refusal is a real HTTP error.
Long bodies are read, rendered and encoded in a worker thread. What holds an answer to a form is
made in forms.py, and what reads it in outputs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TypeVar

from kttrio.request import GenerateRequest, ImageInput, SamplingParams
from kttrio.server.constraints import Constraints
from kttrio.server.decoding import Decoder
from kttrio.server.errors import BadRequestError
from kttrio.server.forms import chat_constraints, held_to, text_constraints
from kttrio.server.image_memory import Hold
from kttrio.server.images import Pictures, refusal
from kttrio.server.off_loop import off_loop
from kttrio.server.outputs import chat_decoder, text_decoder
from kttrio.server.requests import ChatRequest, Options, Prompt, TextRequest
from kttrio.server.served_model import ServedModel
from kttrio.text.chats import ChatFormat
from kttrio.text.continuation import render_open
from kttrio.text.messages import TemplateError
from kttrio.text.tokenizer import EncodeError

DEFAULT_TEXT_TOKENS = 16
SEED_MASK = 2**63 - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """What preparing a request needs beside the request."""

    request_id: str
    num_bytes: int
    """Length of its body."""
    context_length: int
    """The longest sequence that the engine takes, prompt and answer."""
    most_sequences: int
    """As many as an idle engine takes at once."""
    seed: int
    """For a request that has none of its own."""
    constraints: Constraints
    """Where answers are held to a form."""
    visit_id: str | None = None
    """The id of the HTTP request."""
    arrived: float = field(default_factory=perf_counter)


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A choice's prompt, and the text that its answer begins with (none without `echo`)."""

    ids: tuple[int, ...]
    echo: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request's sequences with their decoders, one by one. Choice i is sequence i."""

    intake: Intake
    client_id: str | None
    """The client's own name for it."""
    requests: Sequence[GenerateRequest]
    decoders: Sequence[Decoder]
    num_prompt_tokens: int
    """Each prompt once."""
    prompts: Sequence[EchoedPrompt]
    image_memory: Hold | None = None
    """To be released when the sequences have ended."""


async def prepare_chat(model: ServedModel, request: ChatRequest, intake: Intake) -> Prepared:
    """The sequences of a chat completion. Raises ApiError."""
    if request.tools and model.tool_call_parser is None:
        raise BadRequestError(
            "This server cannot read this model's tool calls: send no 'tools', or start it with "
            "--tool-call-parser.",
            "tools",
        )
    options = request.options
    _check_sequences(1, options.n, intake)
    pictures = await _open_images(model, request, intake)
    text, plain = await _encoded(intake, lambda: _encode_chat(model, request))
    ids, starts = pictures.spread(plain) if pictures else (plain, ())
    max_tokens = _most_tokens(options, len(ids), intake)
    check_length(len(ids), max_tokens, intake.context_length)
    params = sampling(model, options, intake, max_tokens=max_tokens)
    constraints = await chat_constraints(model, request, text, intake.constraints)
    images, hold = await _draw_images(pictures, starts) if pictures else ((), None)
    sequences = _sequences(intake, [ids] * options.n, params, options.n, images)
    return Prepared(
        intake,
        options.client_id,
        held_to(constraints, sequences),
        [chat_decoder(model, request, text) for _ in range(options.n)],
        len(ids),
        [EchoedPrompt(ids, "")] * options.n,
        hold,
    )


async def chat_ids(model: ServedModel, request: ChatRequest, intake: Intake) -> tuple[int, ...]:
    """The tokens of a chat's prompt. Raises ApiError."""
    pictures = await _open_images(model, request, intake)
    _, plain = await _encoded(intake, lambda: _encode_chat(model, request))
    return pictures.spread(plain)[0] if pictures else plain


async def prepare_text(model: ServedModel, request: TextRequest, intake: Intake) -> Prepared:
    """The sequences of a text completion: `n` for each prompt. Raises ApiError."""
    options = request.options
    _check_sequences(len(request.prompts), options.n, intake)
    prompts = await _encoded(intake, lambda: [_encode_prompt(model, p) for p in request.prompts])
    max_tokens = options.max_tokens
    if max_tokens is None:
        max_tokens = DEFAULT_TEXT_TOKENS
    for ids in prompts:
        check_length(len(ids), max_tokens, intake.context_length)
    params = sampling(model, options, intake, max_tokens=max_tokens, echo=request.echo)
    echoed = [
        EchoedPrompt(ids, _echo(model, prompt, ids) if request.echo else "")
        for prompt, ids in zip(request.prompts, prompts, strict=True)
        for _ in range(options.n)
    ]
    sequences = _sequences(intake, [prompt.ids for prompt in echoed], params, options.n)
    constraints = await text_constraints(model, options, intake.constraints, count=len(echoed))
    return Prepared(
        intake,
        options.client_id,
        held_to(constraints, sequences),
        [text_decoder(model, options) for _ in echoed],
        sum(map(len, prompts)),
        echoed,
    )


def _most_tokens(options: Options, num_prompt_tokens: int, intake: Intake) -> int:
    room = max(intake.context_length - num_prompt_tokens, 1)
    if options.max_tokens is None:
        return room
    return min(options.max_tokens, room) if options.fit_context else options.max_tokens


async def _encoded(intake: Intake, work: Callable[[], T]) -> T:
    try:
        return await off_loop(intake.num_bytes, work)
    except TemplateError as error:
        raise BadRequestError(str(error), "messages") from error
    except EncodeError as error:
        raise BadRequestError(str(error)) from error


def _encode_chat(model: ServedModel, request: ChatRequest) -> tuple[str, tuple[int, ...]]:
    if model.template is None:
        raise BadRequestError(
            f"The model '{model.name}' has no chat template: use /v1/completions, or start the "
            "server with --chat-template."
        )
    text = _render(model.template, request)
    return text, tuple(model.tokenizer.encode(text))


def _render(format: ChatFormat, request: ChatRequest) -> str:
    tools, kwargs = request.tools or None, request.template_kwargs
    if request.continues:
        return render_open(format, request.messages, tools=tools, chat_template_kwargs=kwargs)
    return format.render(
        request.messages,
        tools=tools,
        add_generation_prompt=request.generation_prompt,
        chat_template_kwargs=kwargs,
    )


async def _open_images(model: ServedModel, request: ChatRequest, intake: Intake) -> Pictures | None:
    if not request.images:
        return None
    if model.images is None:
        complaint = f"is an image, but the model '{model.name}' takes only text"
        raise refusal(request.images[0], complaint)
    return await model.images.open(request.images, most_tokens=intake.context_length)


async def _draw_images(
    pictures: Pictures, starts: Sequence[int]
) -> tuple[tuple[ImageInput, ...], Hold]:
    hold = pictures.hold()
    try:
        return await pictures.draw(starts), hold
    except BaseException:
        hold.release()
        raise


def _encode_prompt(model: ServedModel, prompt: Prompt) -> tuple[int, ...]:
    if isinstance(prompt, tuple):
        return prompt
    return tuple(model.tokenizer.encode(prompt, add_special_tokens=True))


def _echo(model: ServedModel, prompt: Prompt, ids: tuple[int, ...]) -> str:
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(list(ids))


def _check_sequences(num_prompts: int, n: int, intake: Intake) -> None:
    """Refuse what no idle server would take: a 429 would make the client try for ever."""
    if num_prompts * n > intake.most_sequences:
        raise BadRequestError(
            f"You asked for {num_prompts * n} answers at once, {n} for each prompt; this server "
            f"takes at most {intake.most_sequences} (--max-running-requests and "
            "--max-queued-requests). Send them in smaller batches.",
            "prompt" if num_prompts > 1 else "n",
            "invalid_value",
        )


def check_length(num_prompt_tokens: int, max_tokens: int, context_length: int) -> None:
    """Refuse what the context cannot hold, with the numbers."""
    if num_prompt_tokens == 0:
        raise BadRequestError("The prompt has no tokens; it needs at least one.", "prompt")
    if num_prompt_tokens + max_tokens > context_length:
        raise BadRequestError(
            f"This server holds {context_length} tokens of prompt and answer together. You asked "
            f"for {num_prompt_tokens + max_tokens}: {num_prompt_tokens} in the prompt, "
            f"{max_tokens} to generate. Shorten the prompt or ask for a shorter answer.",
            code="context_length_exceeded",
        )


def sampling(
    model: ServedModel, options: Options, intake: Intake, *, max_tokens: int, echo: bool = False
) -> SamplingParams:
    """The request's values, or the checkpoint's where it has none."""
    if options.min_tokens > max_tokens:
        message = f"'min_tokens' must not be above the {max_tokens} tokens to generate."
        raise BadRequestError(message, "min_tokens", "invalid_value")
    defaults = model.defaults
    stop_ids = frozenset(options.stop_token_ids)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=intake.seed if options.seed is None else options.seed & SEED_MASK,
        temperature=_first(options.temperature, defaults.temperature),
        top_p=_first(options.top_p, defaults.top_p),
        top_k=defaults.top_k if options.top_k is None else options.top_k,
        min_p=_first(options.min_p, defaults.min_p),
        repetition_penalty=_first(options.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_first(options.presence_penalty, defaults.presence_penalty),
        frequency_penalty=_first(options.frequency_penalty, defaults.frequency_penalty),
        logit_bias=options.logit_bias,
        min_tokens=options.min_tokens,
        stop_token_ids=stop_ids if options.ignore_eos else stop_ids | model.end_ids,
        logprobs=options.logprobs,
        prompt_logprobs=options.logprobs if echo else None,
    )


def _first(given: float | None, default: float) -> float:
    return default if given is None else given


def _sequences(
    intake: Intake,
    prompts: Sequence[tuple[int, ...]],
    params: SamplingParams,
    n: int,
    images: tuple[ImageInput, ...] = (),
) -> list[GenerateRequest]:
    """One sequence per entry. The `n` of one prompt differ in their seeds, the prompts do not: a
    prompt is answered alike, alone or among others."""
    choices = [replace(params, seed=choice_seed(params.seed, i)) for i in range(n)]
    return [
        GenerateRequest(f"{intake.request_id}-{i}", ids, choices[i % n], images)
        for i, ids in enumerate(prompts)
    ]


def choice_seed(seed: int, index: int) -> int:
    """A seed per choice: far apart, and the same whenever the request comes again."""
    return (seed + index * GOLDEN_RATIO) & SEED_MASK
