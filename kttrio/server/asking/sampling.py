"""How answers are drawn and where they end: the fields that OpenAI's, vLLM's and SGLang's clients
send with every kind of request.

Other protocols take the record as it is, or inherit from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kttrio.server.requests import Options
from kttrio.server.schema.kinds import Boolean, Integer, Number, Strings, Text, refuse
from kttrio.server.schema.records import given, ignored, refused
from kttrio.server.schema.tokens import MAX_ID, Biases, TokenIds

MAX_CHOICES = 128
MAX_STOPS = 64
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFields:
    """What every body may say about the drawing of tokens. None: the checkpoint's own default."""

    temperature: float | None = given(Number(0, 2), "0 takes the likeliest token")
    top_p: float | None = given(Number(0, 1, above=True), "draw from the likeliest with this sum")
    top_k: int | None = given(Integer(-1, MAX_ID), "draw from so many; -1 and 0: from all")
    min_p: float | None = given(Number(0, 1), "least probability beside the likeliest token's")
    presence_penalty: float | None = given(Number(-2, 2), "off the logits of tokens in the answer")
    frequency_penalty: float | None = given(Number(-2, 2), "the same for each time they are in it")
    repetition_penalty: float | None = given(
        Number(0.01, 10), "divides the logits of tokens in prompt and answer"
    )
    logit_bias: tuple[tuple[int, float], ...] = given(
        Biases(), "added to the logits, by token id", default=()
    )
    seed: int | None = given(Integer(-(2**63)), "the same seed, the same answer")
    n: int = given(Integer(1, MAX_CHOICES), "answers for each prompt", default=1)
    min_tokens: int = given(Integer(0), "tokens before the answer may end", default=0)
    ignore_eos: bool = given(Boolean(), "go on behind the model's own end", default=False)
    stop: tuple[str, ...] = given(Strings(MAX_STOPS), "texts that end the answer", default=())
    stop_token_ids: tuple[int, ...] = given(TokenIds(), "tokens that end it", default=())
    include_stop_str_in_output: bool = given(
        Boolean(), "the answer keeps the text or token that ended it", default=False
    )
    no_stop_trim: bool = given(Boolean(), "the same in SGLang's words", default=False)
    skip_special_tokens: bool = given(
        Boolean(), "special tokens leave no text in the answer", default=True
    )
    return_token_ids: bool = given(
        Boolean(), "tell the tokens of prompt and answer by their ids", default=False
    )
    rid: str | None = given(Text(1), "a name for the request, to abort it by")
    request_id: str | None = given(Text(1), "the same in vLLM's words")

    stop_regex: None = refused("give the texts themselves as 'stop'")
    allowed_token_ids: None = refused("use 'logit_bias', or 'regex' for the form of the answer")
    bad_words: None = refused("use 'logit_bias' with their tokens")
    typical_p: None = refused("use 'top_p' or 'min_p'", harmless=(1,))
    use_beam_search: None = refused("answers are sampled")
    length_penalty: None = refused("it belongs to beam search", harmless=(1,))
    prompt_logprobs: None = refused("use /v1/completions with 'echo' and 'logprobs'")
    return_tokens_as_token_ids: None = refused("use 'return_token_ids'")
    truncate_prompt_tokens: None = refused("shorten the prompt before you send it")
    custom_logit_processor: None = refused("the server runs no code of its clients")
    custom_params: None = refused("they belong to 'custom_logit_processor'")
    logits_processors: None = refused("the server runs no code of its clients")
    thinking_token_budget: None = refused("limit the whole answer with 'max_tokens'")
    lora_path: None = refused("this server has no adapters")
    session_params: None = refused("send the whole conversation each time")
    return_hidden_states: None = refused("this server tells text and log-probabilities")
    vllm_xargs: None = refused("this server has no such extensions")
    kv_transfer_params: None = refused("prompts are computed where they are answered")
    repeat_penalty: None = refused("use 'repetition_penalty'", harmless=(1,))

    spaces_between_special_tokens: None = ignored("tokens carry their own spaces")
    priority: None = ignored("requests are served in the order of their arrival")
    cache_salt: None = ignored("requests share no cache")
    user: None = ignored("answers do not depend on who asks")
    safety_identifier: None = ignored("answers do not depend on who asks")
    metadata: None = ignored("nothing is stored")
    store: None = ignored("nothing is stored")
    service_tier: None = ignored("there is one")
    prompt_cache_key: None = ignored("requests share no cache")
    prompt_cache_retention: None = ignored("requests share no cache")


def sampling_options(fields: SamplingFields, *, vocab_size: int) -> Options:
    """The options they stand for; what else a body says is filled in by its protocol. Raises
    BadRequestError for tokens that the model does not have."""
    check_ids(fields.stop_token_ids, vocab_size=vocab_size, path="stop_token_ids")
    check_ids([token for token, _ in fields.logit_bias], vocab_size=vocab_size, path="logit_bias")
    return Options(
        n=fields.n,
        min_tokens=fields.min_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=None if fields.top_k is None else max(fields.top_k, 0),
        min_p=fields.min_p,
        repetition_penalty=fields.repetition_penalty,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias=fields.logit_bias,
        seed=fields.seed,
        stop=fields.stop,
        stop_token_ids=fields.stop_token_ids,
        ignore_eos=fields.ignore_eos,
        keep_stop=fields.include_stop_str_in_output or fields.no_stop_trim,
        skip_special_tokens=fields.skip_special_tokens,
        return_token_ids=fields.return_token_ids,
        client_id=fields.rid or fields.request_id,
    )


def check_ids(ids: Sequence[int], *, vocab_size: int, path: str) -> None:
    """Refuse ids that are no token's."""
    if any(token >= vocab_size for token in ids):
        refuse(path, f"has an id that is no token: they lie between 0 and {vocab_size - 1}")
