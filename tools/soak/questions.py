"""What the soak asks: conversations the demo model has learnt, forms that bind it, and prompts that
it only goes on with. Each is asked in every protocol that can."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tools.demo import corpus

NUM_TALKS = 12
TALK_TOKENS = 64
FORM_TOKENS = 48
LONG_TOKENS = 160
PROMPTS = ("The experts of a mixture", "def is_prime(n):\n", "To install kttrio, run", "Lucia says")
COLOURS = {"type": "string", "enum": ["red", "green", "blue"]}
FORMS: tuple[dict[str, Any], ...] = (
    {
        "type": "object",
        "properties": {"colour": COLOURS, "count": {"type": "integer", "maximum": 99}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    },
    {"type": "array", "items": COLOURS, "minItems": 2, "maxItems": 3},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One thing to ask. `prompt` is text to go on with; else it is a conversation."""

    name: str
    max_tokens: int
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    form: dict[str, Any] | None = None
    """JSON Schema of the answer."""
    fields: dict[str, Any] = field(default_factory=dict)
    """More, as OpenAI's chat and completions call it; no other protocol is asked then."""


def questions() -> list[Question]:
    """All of them; the same each time."""
    return [*_talks(), *_forced(), *_forms(), *_prompts(), *_long()]


def _talks() -> list[Question]:
    drawn = enumerate(corpus.conversations(1, NUM_TALKS))
    return [
        Question(
            name=f"talk {number}",
            max_tokens=TALK_TOKENS,
            messages=_asked(talk),
            tools=tuple(talk.tools),
        )
        for number, talk in drawn
    ]


def _asked(talk: corpus.Conversation) -> tuple[dict[str, Any], ...]:
    """Up to the first thing that the user says."""
    first = next(i for i, message in enumerate(talk.messages) if message["role"] == "user")
    return tuple(talk.messages[: first + 1])


def _forced() -> list[Question]:
    """Tools must be called, wanted or not."""
    talks = (talk for talk in corpus.conversations(2, 4 * NUM_TALKS) if talk.tools)
    return [
        Question(
            name=f"forced {number}",
            max_tokens=TALK_TOKENS,
            messages=_asked(talk),
            tools=tuple(talk.tools),
            fields={"tool_choice": "required"},
        )
        for number, talk in zip(range(3), talks, strict=False)
    ]


def _forms() -> list[Question]:
    messages = (corpus.user("What is kttrio?"),)
    return [
        Question(name=f"form {number}", max_tokens=FORM_TOKENS, messages=messages, form=form)
        for number, form in enumerate(FORMS)
    ]


def _prompts() -> list[Question]:
    return [
        Question(name=f"prompt {number}", max_tokens=FORM_TOKENS, prompt=prompt)
        for number, prompt in enumerate(PROMPTS)
    ]


def _long() -> list[Question]:
    """Beyond where the model would end."""
    on, no_end = (corpus.user("How do I install kttrio?"),), {"ignore_eos": True}
    return [
        Question(name="long talk", max_tokens=LONG_TOKENS, messages=on, fields=no_end),
        Question(name="long prompt", max_tokens=LONG_TOKENS, prompt=PROMPTS[0], fields=no_end),
    ]
