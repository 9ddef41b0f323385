"""What the server knows of the model: a name, how text becomes tokens and back, what it sees.

Read from the checkpoint's files before the weights are; nothing here runs the model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kttrio.config import ServerConfig
from kttrio.server.images import ImageReader
from kttrio.text import reasoning
from kttrio.text.chats import ChatFormat, load_chat_format
from kttrio.text.generation import GenerationDefaults
from kttrio.text.grammar import Grammars
from kttrio.text.images import ImageFormat
from kttrio.text.reasoning import ReasoningFormat
from kttrio.text.tokenizer import Tokenizer
from kttrio.text.tool_parsers import base as tool_parsers

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A checkpoint without its weights.

    `template` None: no chats. The parsers are names of `text/`; None: tools are refused, and
    reasoning is plain text.
    """

    name: str
    created: int
    tokenizer: Tokenizer
    template: ChatFormat | None
    defaults: GenerationDefaults
    tool_call_parser: str | None
    reasoning_parser: str | None
    images: ImageReader | None
    """None: requests with images are refused."""
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    grammars: Grammars

    @classmethod
    def load(
        cls, directory: Path, config: ServerConfig, *, images: ImageFormat | None = None
    ) -> ServedModel:
        """Read the text side of a checkpoint. Raises ConfigError."""
        template = load_chat_format(directory, override=config.chat_template)
        taught = template.text if template else ""
        tokenizer, defaults = Tokenizer.load(directory), GenerationDefaults.load(directory)
        end_ids = tokenizer.eos_ids | frozenset(defaults.eos_token_ids)
        return cls(
            name=config.served_model_name or directory.resolve().name,
            created=int(time.time()),
            tokenizer=tokenizer,
            template=template,
            defaults=defaults,
            tool_call_parser=_chosen(config.tool_call_parser, tool_parsers, taught),
            reasoning_parser=_chosen(config.reasoning_parser, reasoning, taught),
            images=ImageReader(images, config) if images else None,
            end_ids=end_ids,
            grammars=Grammars(tokenizer, end_ids),
        )

    @property
    def facts(self) -> Mapping[str, str]:
        """What was chosen, for the operator."""
        if self.template is None:
            return {"chats": "refused: no chat template; --chat-template FILE gives one"}
        images = {"images": self.images.limit} if self.images else {}
        return {
            "tool calls": self.tool_call_parser or "refused: no parser knows the chat template",
            "reasoning": self.reasoning_parser or reasoning.OFF,
            **images,
        }

    @property
    def reasoning_format(self) -> ReasoningFormat | None:
        """How reasoning is told from answers, if it is."""
        return reasoning.FORMATS.get(self.reasoning_parser or reasoning.OFF)


class Parsers(Protocol):
    """The module of one kind of parser."""

    def check_name(self, name: str) -> str: ...

    def detect(self, taught: str, /) -> str | None: ...


def _chosen(flag: str | None, parsers: Parsers, taught: str) -> str | None:
    """The parser that the flag names, else the one for what the checkpoint was taught."""
    return parsers.check_name(flag) if flag not in (None, AUTO) else parsers.detect(taught)
