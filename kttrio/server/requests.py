"""What can be asked of the model, in no protocol's words. Each protocol reads its bodies into these
records and checks the values; prompting.py makes sequences of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from kttrio.text.grammar import Form

Prompt = str | tuple[int, ...]


class ReasoningView(Enum):
    """How an answer shows the model's reasoning."""

    STREAMED = "apart from the text, as it comes"
    AT_ONCE = "apart from the text, when it is complete"
    IN_TEXT = "in the text, tags and all"
    HIDDEN = "not at all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What every kind of request says about generating. None: the model's own default."""

    stream: bool = False
    include_usage: bool = False
    n: int = 1
    max_tokens: int | None = None
    fit_context: bool = False
    """`max_tokens` is a most: what the context has no room for is not refused but left out."""
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    form: Form | None = None
    """What the answer must look like, after its reasoning."""
    keep_stop: bool = False
    """The answer keeps the stop string, or the text of the token, that ended it."""
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    continuous_usage: bool = False
    """A stream tells its usage in every chunk."""
    client_id: str | None = None
    """The client's own name for the request."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image as a request names it."""

    url: str
    path: str
    """Where it stands in the body."""
    low_detail: bool
    """A small one will do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A chat completion; `messages` and `tools` are as the chat template takes them."""

    options: Options
    messages: list[dict[str, Any]]
    images: tuple[ImageSource, ...] = ()
    """Of all messages in order, one for each part of the type `image`."""
    tools: list[dict[str, Any]]
    parallel_tool_calls: bool = True
    reasoning: ReasoningView = ReasoningView.STREAMED
    continues: bool = False
    """The answer goes on where the last message, the assistant's, ends."""
    generation_prompt: bool = True
    """The prompt ends with the words that begin an answer."""
    forced_calls: tuple[str, ...] = ()
    """The answer is a call of one of these tools, or several; none given: as the model likes."""
    template_kwargs: dict[str, Any]

    @property
    def said(self) -> str | None:
        """The text that the answer goes on with; None: it is a message of its own."""
        return self.messages[-1]["content"] if self.continues else None


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A text completion of one or several prompts."""

    options: Options
    prompts: tuple[Prompt, ...]
    echo: bool = False
